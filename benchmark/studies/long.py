"""Suite `long`, agents that learn Atari: python -m benchmark.studies.long FOLDER

FOLDER is the suite's (runs/benchmark/long). Keeps its finished runs in results/suites/long, and what their world models
pay in each tenth of training in results/long_losses.csv. Tables and picture come from these. The protocol is in
benchmark/PROTOCOL.md.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from benchmark.common import RESULTS, markdown, mean_interval, read_table
from benchmark.launch.keep import keep
from benchmark.report.pictures import COLOURS, LINES, called, save_figure
from benchmark.report.runs import FinishedRun, read_known_scores, read_results
from benchmark.report.scores import cell
from benchmark.studies.by_tenths import add, rows_of
from benchmark.studies.transition import LOSSES, TENTHS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

FOLDER, FILE = RESULTS / "suites" / "long", RESULTS / "long_losses.csv"
KEY = ("algorithm", "task", "seed")


def collect(folder: Path) -> int:
    """Keep the finished runs, and the losses of those with a world model; return the runs' number."""
    runs = [(run_dir, dict(zip(KEY, run_dir.parts[-3:], strict=True))) for run_dir in keep(folder, FOLDER)]
    add(FILE, [row for run_dir, key in runs for row in rows_of(run_dir, key, LOSSES)])
    return len(runs)


def score(run: FinishedRun, step: int) -> tuple[float, float, float]:
    """What the policy of that step scored in new games: mean, and Student's 95 % interval over the games."""
    games = run.policies[step]
    return games.mean(), *mean_interval(games)


def score_table() -> str:
    """Markdown: each run's final policy in new games, beside the policies on the way, training and known scores."""
    rows = []
    for run in read_results(FOLDER).runs:
        known, best = read_known_scores()[run.game], max(run.policies, key=lambda step: run.policies[step].mean())
        others = [f"{known[name]:,.1f}" for name in ("random", "human", "published_ppo")]
        final = f"{cell(*score(run, run.done['steps']), 'z.1f')}, {len(run.policies[run.done['steps']])} games"
        on_the_way = f"{cell(*score(run, best), 'z.1f')} at {best / 1e6:.1f} M"
        steps = f"{run.done['steps'] / 1e6:.1f} M"
        rows.append(
            [run.game, called(run.algorithm), str(run.seed), steps, final, on_the_way, f"{run.last:z.1f}", *others]
        )
    header = [
        "game",
        "algorithm",
        "seed",
        "steps",
        "final policy",
        "best of ten policies",
        "last 100 games in training",
    ]
    return markdown([*header, "random player", "human", "authors' PPO, best in 10 M"], rows)


def loss_table() -> str:
    """Markdown: what each world model pays in the second tenth and the last, beside trivial predictors."""
    rows = {}
    for row in read_table(FILE):
        if row["tenth"] in ("2", str(TENTHS)):
            pairs = ("transition_mean", "transition_copy"), ("reward", "reward_zero")
            cells = [" : ".join(f"{float(row[name]):.2g}" for name in pair) for pair in pairs]
            rows.setdefault(tuple(row[name] for name in KEY), []).append(cells)
    table = [
        [task.removesuffix("-v5"), called(algorithm), seed, *(f"{a} → {b}" for a, b in zip(*cells, strict=True))]
        for (algorithm, task, seed), cells in sorted(rows.items(), key=lambda item: item[0][1:])
    ]
    header = ["game", "algorithm", "seed", "ℓ_P of P̄'s mean : copying", "ℓ_R : always 0"]
    return markdown(header, table) if table else "None yet."


def draw() -> None:
    """A panel a game: what the kept policies score, with the interval over games; dashed: the human tester."""
    results = read_results(FOLDER)
    figure, axes = plt.subplots(1, len(results.tasks), figsize=(5 * len(results.tasks), 3.8), layout="constrained")
    for axis, task in zip(np.atleast_1d(axes), results.tasks, strict=True):
        for run in (run for run in results.runs if run.task == task):
            steps, look = list(run.policies), {"color": COLOURS[run.algorithm]}
            means, low, high = np.array([score(run, step) for step in steps]).T
            axis.plot(
                steps, means, LINES.get(run.algorithm, "-"), marker="o", ms=4, label=called(run.algorithm), **look
            )
            axis.fill_between(steps, low, high, alpha=0.15, linewidth=0, **look)
            axis.axhline(read_known_scores()[run.game]["human"], color="0.4", lw=1, ls="--")
        axis.set(title=task, xlabel="agent steps", ylabel="return in new games")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M
        axis.legend(fontsize=8)
    save_figure(figure, RESULTS / "long.png")


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmark.studies.long", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the suite's folder in benchmark.run's results")
    print(f"{collect(parser.parse_args(words).folder)} finished runs in {FOLDER}")
    draw()
    print(score_table(), loss_table(), sep="\n\n")


if __name__ == "__main__":
    main()
