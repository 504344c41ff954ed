"""Suite `long`, agents that learn Atari: python -m benchmark.studies.long FOLDER

FOLDER is the suite's (runs/benchmark/long). Keeps its finished runs in results/suites/long. Of an unfinished one whose
policies on the way have played (`python -m benchmark.launch.policies RUN_DIR`), keeps these games in
results/long_unfinished. What the world models pay in each tenth of training goes to results/long_losses.csv. Tables and
picture come from these. The protocol is in benchmark/PROTOCOL.md.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from benchmark.common import RESULTS, markdown, mean_interval, read_table
from benchmark.launch.keep import config_to_keep, finished, keep
from benchmark.report.pictures import COLOURS, LINES, called, save_figure
from benchmark.report.runs import FinishedRun, read_known_scores, read_policies, read_results
from benchmark.report.scores import cell
from benchmark.studies.by_tenths import add, rows_of
from benchmark.studies.transition import LOSSES, TENTHS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

FOLDER, FILE = RESULTS / "suites" / "long", RESULTS / "long_losses.csv"
UNFINISHED = RESULTS / "long_unfinished"
KEY = ("algorithm", "task", "seed")


class Curve(NamedTuple):
    """What a run's kept policies scored in new games: step → returns."""

    algorithm: str
    task: str
    seed: int
    policies: dict[int, np.ndarray]
    finished: bool


def collect(folder: Path) -> int:
    """Keep the finished runs, the unfinished ones, and the losses of their world models; return the finished' number.

    Raises SystemExit(1) if there is no run to keep.
    """
    unfinished = [path.parent for path in sorted(folder.glob("*/*/*/policies.csv"))]
    unfinished = [run_dir for run_dir in unfinished if not (run_dir / "done.json").exists()]
    runs = keep(folder, FOLDER) if finished(folder) or not unfinished else []
    rows = []
    for run_dir in runs:
        shutil.rmtree(UNFINISHED / run_dir.relative_to(folder), ignore_errors=True)
        rows += rows_of(run_dir, dict(zip(KEY, run_dir.parts[-3:], strict=True)), LOSSES)
    for run_dir in unfinished:
        copy, config = UNFINISHED / run_dir.relative_to(folder), config_to_keep(run_dir)
        copy.mkdir(parents=True, exist_ok=True)
        (copy / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(run_dir / "policies.csv", copy / "policies.csv")
        whole = len(read_policies(run_dir, 0))  # tenths of the run
        key = dict(zip(KEY, run_dir.parts[-3:], strict=True))
        rows += rows_of(run_dir, key, LOSSES, config["args"]["total_timesteps"])[:whole]
    add(FILE, rows)
    return len(runs)


def curves() -> list[Curve]:
    """Of the finished runs, then of the unfinished ones."""
    folders = sorted(UNFINISHED.glob("*/*/*"))
    return [Curve(*run.key, run.policies, True) for run in read_results(FOLDER).runs] + [
        Curve(*folder.parts[-3:-1], int(folder.name), read_policies(folder, 0), False) for folder in folders
    ]


def score(run: FinishedRun | Curve, step: int) -> tuple[float, float, float]:
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


def policies_table() -> str:
    """Markdown: what each kept policy scored, a row a tenth of training, a column a run."""
    runs = sorted(curves(), key=lambda run: (run.task, run.seed))
    rows = {}
    for i, run in enumerate(runs):
        for step in run.policies:  # scripts' rollouts differ: so do their steps, by 1 % of the run
            rows.setdefault(round(step / 1e5), [""] * len(runs))[i] = cell(*score(run, step), "z.1f")
    names = [f"{run.task.removesuffix('-v5')}, {called(run.algorithm)}, seed {run.seed}" for run in runs]
    names = [name + (", unfinished" if not run.finished else "") for name, run in zip(names, runs, strict=True)]
    return markdown(["steps", *names], [[f"{steps / 10:.1f} M", *cells] for steps, cells in sorted(rows.items())])


def loss_table() -> str:
    """Markdown: what each world model pays in the second tenth of training and the last, beside trivial predictors."""
    rows = {}
    for row in read_table(FILE):
        pairs = ("transition_mean", "transition_copy"), ("reward", "reward_zero")
        cells = [" : ".join(f"{float(row[name]):.2g}" for name in pair) for pair in pairs]
        rows.setdefault(tuple(row[name] for name in KEY), {})[int(row["tenth"])] = cells
    table = [
        [
            *(task.removesuffix("-v5"), called(algorithm), seed),
            f"{max(tenths)} of {TENTHS}",
            *(f"{a} → {b}" for a, b in zip(tenths[2], tenths[max(tenths)], strict=True)),
        ]
        for (algorithm, task, seed), tenths in sorted(rows.items(), key=lambda item: item[0][1:])
        if len(tenths) > 1
    ]
    header = ["game", "algorithm", "seed", "last tenth", "ℓ_P of P̄'s mean : copying", "ℓ_R : always 0"]
    return markdown(header, table) if table else "None yet."


def draw() -> None:
    """A panel a game: what the kept policies score, with the interval over games; dashed: the human tester."""
    runs = curves()
    tasks = list(dict.fromkeys(run.task for run in runs))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.8), layout="constrained")
    for axis, task in zip(np.atleast_1d(axes), tasks, strict=True):
        for run in (run for run in runs if run.task == task):
            steps, look = list(run.policies), {"color": COLOURS[run.algorithm]}
            means, low, high = np.array([score(run, step) for step in steps]).T
            name = called(run.algorithm) + ("" if run.finished else ", unfinished")
            axis.plot(steps, means, LINES.get(run.algorithm, "-"), marker="o", ms=4, label=name, **look)
            axis.fill_between(steps, low, high, alpha=0.15, linewidth=0, **look)
        axis.axhline(read_known_scores()[task.removesuffix("-v5")]["human"], color="0.4", lw=1, ls="--")
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
    print(score_table(), policies_table(), loss_table(), sep="\n\n")


if __name__ == "__main__":
    main()
