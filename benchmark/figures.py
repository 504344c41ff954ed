"""The documents' tables and pictures from the committed results: python -m benchmark.figures

Each table stands in README.md, or in benchmark/README.md, between `<!-- table: NAME -->` and `<!-- end -->`, and is
written anew there.
"""

import re
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from benchmark import confounding, confounding_mechanism, differences, throughput_figures
from benchmark.collect import CURVE_PARTS, markdown, mean_interval, parts, read_table
from benchmark.report_runs import read_known_scores, read_results
from benchmark.suites import CONTROL_STEPS, CONTROL_TASKS, MEASURED_SPS, SOLVED_AT, SUITES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
CONTROL, EARLY, PILOT = (RESULTS / "suites" / name for name in ("control", "early", "pilot"))
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmark" / "README.md")


def atari_table() -> str:
    """Per script and game: how the metrics went from the first tenth of the run to the last."""
    values = defaultdict(list)  # in step order
    for row in read_table(RESULTS / "atari_200k_metrics.csv"):
        values[row["env_id"], row["script"], row["metric"]].append(float(row["value"]))
    columns = {
        "ℓ_R": "world_model/reward_loss",
        "ℓ_P": "world_model/transition_loss",
        "explained variance": "losses/explained_variance",
        "entropy": "losses/entropy",
        "outside N^C": "spi/outside_neighbourhood",
    }
    rows = []
    for run in read_table(RESULTS / "atari_200k.csv"):
        cells = []
        for metric in columns.values():
            series = values[run["env_id"], run["script"], metric]
            cells.append(f"{series[0]:.3g} → {series[-1]:.3g}" if series else "")
        counted = min(int(run["episodes"]), 100)
        mean_return = f"{run['mean_return_last_100']} ({counted} games)" if counted else "no game ended"
        rows.append([run["env_id"], f"`{run['script']}`", f"{int(run['steps']):,}", run["sps"], mean_return, *cells])
    return markdown(["game", "script", "steps", "SPS", "return, last games", *columns], rows)


def pilot_table() -> str:
    """Per game of suite `pilot`: what the final policy scores, with its 95 % interval over games, best first."""
    rows = {}  # by human-normalised score
    for run in read_results(PILOT).runs:
        returns, known = differences.final_returns(PILOT, run), read_known_scores()[run.game]
        low, high = mean_interval(returns)
        score = float(run.normalised(returns.mean()))
        mean = f"{returns.mean():,.1f} [{low:,.1f}, {high:,.1f}]"
        rows[score] = [run.game, mean, f"{known['random']:,g}", f"{known['human']:,g}", f"{score:.2f}"]
    header = ["game", "final policy, 64 games", "random player", "human", "human-normalised"]
    return markdown(header, [rows[score] for score in sorted(rows, reverse=True)])


def cost_table() -> str:
    """Per suite: runs, steps, and core-hours if every script ran as fast as it was measured with default settings."""
    rows = []
    for name, suite in SUITES.items():
        runs = len(suite.algorithms) * len(suite.tasks) * suite.seeds
        steps = suite.seeds * sum(task.total_timesteps for task in suite.tasks)  # of one algorithm
        speeds = [MEASURED_SPS[algorithm.script] for algorithm in suite.algorithms.values()]
        hours = sum(steps / sps * threads for sps, threads in speeds) / 3600
        rows.append([f"`{name}`", f"{runs:,}", f"{len(speeds) * steps / 1e6:,.1f} M", f"{hours:,.1f}"])
    return markdown(["suite", "runs", "agent steps in all", "core-hours"], rows)


def control_figure() -> None:
    """Return over steps on the control tasks: each placement's mean over seeds, with its interval, and every seed."""
    curves = defaultdict(lambda: defaultdict(list))  # task → algorithm → {step: return} of each seed
    for run in read_results(CONTROL).runs:
        curve = parts(run.ends, run.returns, run.done["steps"], CURVE_PARTS)
        curves[run.task][run.algorithm].append(dict(curve))
    figure, axes = plt.subplots(2, len(CONTROL_STEPS), figsize=(11, 6), layout="constrained")
    for axis, task in zip(axes.T.flat, CONTROL_TASKS, strict=True):  # a column per environment
        axis.set(title=task.label)
        for i, (name, algorithm) in enumerate(differences.PLACEMENTS.items()):
            seeds = curves[task.label][algorithm]
            steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
            returns = np.array([[seed[step] for step in steps] for seed in seeds])  # (seeds, steps)
            steps = np.array(steps) / 1000
            axis.plot(steps, returns.T, color=f"C{i}", alpha=0.2, linewidth=0.5)
            axis.fill_between(steps, *mean_interval(returns), color=f"C{i}", alpha=0.25, linewidth=0)
            axis.plot(steps, returns.mean(axis=0), color=f"C{i}", linewidth=1.5, label=f"{name}, {len(seeds)} seeds")
        axis.axhline(SOLVED_AT[task.env_id], color="0.4", linestyle="--", linewidth=1)
    axes[0, 0].legend(loc="lower right", fontsize="small")
    figure.supxlabel("environment steps, in thousands")
    figure.supylabel("return of the games that end there")
    figure.savefig(RESULTS / "control.png", dpi=150, metadata={"Software": None})


TABLES = {
    "control_scores": lambda: differences.placement_score_table(differences.read_scores(CONTROL)),
    "control_differences": lambda: differences.placement_difference_table(differences.read_scores(CONTROL)),
    "atari_200k": atari_table,
    "speed_ratios": lambda: throughput_figures.ratio_table(RESULTS),
    "speed_ratios_later": lambda: throughput_figures.ratio_table(RESULTS / "throughput_later"),
    "speed": lambda: throughput_figures.speed_table(RESULTS),
    "confounding": lambda: confounding.drawdown_table(confounding.by_setting(confounding.read_runs())),
    "mechanism": lambda: confounding_mechanism.table(confounding.RESULTS),
    "early_scores": lambda: differences.score_table(differences.read_scores(EARLY)),
    "early_differences": lambda: differences.difference_table(differences.read_scores(EARLY)),
    "pilot": pilot_table,
    "cost": cost_table,
}


def with_tables(document: str) -> str:
    """The document's text with every table written anew. Raises KeyError for a table that nobody knows."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3],
        document,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text()))
    control_figure()
    throughput_figures.throughput_figure(RESULTS)
    confounding.draw_pictures(confounding.by_setting(confounding.read_runs()))
    confounding_mechanism.draw(confounding.RESULTS)
    print("both README.md and the pictures in benchmark/results are up to date with the CSV files there")
