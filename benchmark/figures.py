"""The documents' tables and pictures from the committed results: python -m benchmark.figures

Each table stands in README.md, or in benchmark/README.md, between `<!-- table: NAME -->` and `<!-- end -->`, and is
written anew there.
"""

import re
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from benchmark import confounding, confounding_mechanism, control, differences, throughput_figures
from benchmark.collect import markdown, mean_interval, read_table
from benchmark.control import THRESHOLDS
from benchmark.suites import MEASURED_SPS, SUITES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmark" / "README.md")


def control_table() -> str:
    """Per task: seeds solved, and the mean return of the last 100 episodes over seeds with its interval."""
    rows = []
    for task, threshold in THRESHOLDS.items():
        runs = control.results(task)
        if not runs:
            rows.append([task, "", f">= {threshold:g}", "no run yet", "", "", ""])
            continue
        returns = np.array([float(row["mean_return_last_100"]) for row in runs])
        low, high = mean_interval(returns)
        minutes = np.median([float(row["minutes"]) for row in runs])
        steps = f"{int(runs[0]['steps']):,}"
        solved = f"{(returns >= threshold).sum()} of {len(returns)}"
        mean = f"{returns.mean():.1f} [{low:.1f}, {high:.1f}]" if low < high else f"{returns.mean():.1f}, all alike"
        extremes = f"{returns.min():.1f} to {returns.max():.1f}"
        rows.append([task, steps, f">= {threshold:g}", solved, mean, extremes, f"{minutes:.1f}"])
    header = [
        "task",
        "steps",
        "solved if",
        "seeds solved",
        "mean [95 % interval]",
        "worst to best seed",
        "minutes a run",
    ]
    return markdown(header, rows)


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
    """Mean return over steps of the three control tasks, with the interval over seeds, and every seed."""
    curves = defaultdict(lambda: defaultdict(dict))  # task → seed → step → return
    for row in read_table(RESULTS / "control_curves.csv"):
        curves[row["env_id"]][row["seed"]][int(row["step"])] = float(row["mean_return"])
    figure, axes = plt.subplots(1, len(THRESHOLDS), figsize=(11, 3.2), layout="constrained")
    for axis, (task, threshold) in zip(axes, THRESHOLDS.items(), strict=True):
        axis.set(title=f"{task}, {len(curves[task])} seeds", xlabel="environment steps")
        if not curves[task]:
            axis.text(0.5, 0.5, "no run yet", transform=axis.transAxes, horizontalalignment="center")
            continue
        seeds = curves[task].values()
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
        returns = np.array([[seed[step] for step in steps] for seed in seeds])  # (seeds, steps)
        low, high = mean_interval(returns)
        axis.plot(steps, returns.T, color="0.8", linewidth=0.7)
        axis.fill_between(steps, low, high, color="C0", alpha=0.3)
        axis.plot(steps, returns.mean(axis=0), color="C0", linewidth=2)
        axis.axhline(threshold, color="C1", linestyle="--", linewidth=1)
    axes[0].set_ylabel("return of the episodes ending there")
    figure.savefig(RESULTS / "control.png", dpi=150, metadata={"Software": None})


TABLES = {
    "control": control_table,
    "atari_200k": atari_table,
    "speed_ratios": lambda: throughput_figures.ratio_table(RESULTS),
    "speed": lambda: throughput_figures.speed_table(RESULTS),
    "confounding": lambda: confounding.drawdown_table(confounding.by_setting(confounding.read_runs())),
    "mechanism": lambda: confounding_mechanism.table(confounding.RESULTS),
    "early_scores": lambda: differences.score_table(differences.read_scores(RESULTS / "suites" / "early")),
    "cost": cost_table,
    "early_differences": lambda: differences.difference_table(differences.read_scores(RESULTS / "suites" / "early")),
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
