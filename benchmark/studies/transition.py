"""Can P̄ learn? Four suites: python -m benchmark.studies.transition FOLDER

Reads the finished runs of suites `transition`, `transition-pong`, `transition-long` and `transition-start` (the first
iterations of two games) below FOLDER (runs/benchmark) into results/transition.csv: of each run ten parts, with medians
of what the world model pays and of what a trivial predictor pays. Tables and picture come from that file. The protocol,
with what decides, is in benchmark/PROTOCOL.md.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

from benchmark.common import (
    RESULTS,
    circumstances,
    markdown,
    mean_interval,
    read_episodes,
    read_events,
    read_table,
    settings_text,
)
from benchmark.report.pictures import save_figure
from benchmark.report.scores import cell, difference, varies
from benchmark.suites import SUITES, TRANSITION_ARMS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FILE = RESULTS / "transition.csv"
STUDY = ("transition", "transition-pong", "transition-long", "transition-start")
TENTHS = 10
LATENT_SIZE = {"CartPole-v1": 32, "LunarLander-v3": 32, "Pong-v5": 3136, "Breakout-v5": 3136}  # ℓ_P is a sum over it
LOSSES = {  # column → metric
    "transition_sampled": "world_model/transition_loss",
    "transition_mean": "world_model/transition_loss_mean",
    "transition_copy": "world_model/transition_loss_copy",
    "reward": "world_model/reward_loss",
    "reward_zero": "world_model/reward_loss_zero",
    "latent_variance": "world_model/latent_variance",
}
ARM_NAMES = {
    "deep_spi": "published",
    "alpha-x10": "α_P × 10",
    "alpha-x100": "α_P × 100",
    "small-scale": "scale 0.01",
    "residual": "z + Δ",
    "residual-small": "z + Δ, scale 0.01",
}
COLOURS = dict(
    zip(TRANSITION_ARMS, ("#009E73", "#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#D55E00"), strict=True)
)  # for colour-blind eyes


def tenths(steps: np.ndarray, values: np.ndarray, last_step: int) -> np.ndarray:
    """Median of a metric in each tenth of (0, last_step]: (10,)."""
    part = np.clip(np.ceil(steps / last_step * TENTHS).astype(int) - 1, 0, TENTHS - 1)
    return np.array([np.median(values[part == i]) if (part == i).any() else np.nan for i in range(TENTHS)])


def rows_of(suite: str, run_dir: Path) -> list[dict]:
    """Ten rows of one finished run; losses of the transition per dimension of the latent."""
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    events, args = read_events(run_dir), config["args"]
    last_step = int(events["charts/SPS"][0][-1])
    returns = read_episodes(run_dir)[-100:, 1]
    key = {"suite": suite, "arm": run_dir.parts[-3], "task": args["env_id"], "seed": args["seed"], "steps": last_step}
    columns = {name: tenths(*events[metric], last_step) for name, metric in LOSSES.items()}
    columns["ratio"] = tenths(*events["world_model/transition_loss_ratio"], last_step)
    for name in ("transition_sampled", "transition_mean", "transition_copy"):
        columns[name] = columns[name] / LATENT_SIZE[args["env_id"]]
    last = {"last_100": f"{returns.mean():.3f}" if len(returns) else "nan"}  # early on no game has ended
    about = last | circumstances(config) | {"settings": settings_text(args)}
    return [
        key | {"tenth": i + 1} | {name: f"{column[i]:.6g}" for name, column in columns.items()} | about
        for i in range(TENTHS)
    ]


def collect(folder: Path) -> int:
    """Add the finished runs below `folder` to the table, in place of rows of the same runs; return their number."""
    found = {}
    for suite in STUDY:
        for done in sorted((folder / suite).glob("*/*/*/done.json")):
            if ".broken-" not in done.parent.name:
                found[suite, *done.parent.parts[-3:]] = rows_of(suite, done.parent)
    kept = defaultdict(list)
    for row in read_table(FILE):
        kept[row["suite"], row["arm"], row["task"], row["seed"]].append(row)
    rows = [row for key in sorted(kept | found) for row in (found.get(key) or kept[key])]
    if not rows:
        raise SystemExit(f"error: FOLDER: no finished run of {', '.join(STUDY)} in {folder}")
    with open(FILE, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len(found)


def runs(suite: str, task: str, arm: str) -> dict[int, list[dict]]:
    """The ten rows of each seed."""
    seeds = defaultdict(list)
    for row in read_table(FILE):
        if (row["suite"], row["task"], row["arm"]) == (suite, task, arm):
            seeds[int(row["seed"])].append(row)
    return dict(sorted(seeds.items()))


def at_the_end(seeds: dict[int, list[dict]], column: str) -> np.ndarray:
    """A column of the last tenth, of each seed."""
    return np.array([float(rows[-1][column]) for rows in seeds.values()])


def geometric(ratios: np.ndarray) -> str:
    """Geometric mean of ratios with the interval of the mean of their logarithms."""
    low, high = np.exp(mean_interval(np.log(ratios)))
    return cell(np.exp(np.log(ratios).mean()), low, high, ".2f")


def transition_table() -> str:
    """Markdown: what P̄ and copying pay per dimension at the end of training, by task and arm, and the return."""
    table = []
    for suite in STUDY:
        for task in SUITES[suite].tasks:
            published = runs(suite, task.env_id, "deep_spi")
            for arm in SUITES[suite].algorithms:
                seeds = runs(suite, task.env_id, arm)
                if not seeds:
                    continue
                length = f"{int(next(iter(seeds.values()))[0]['steps']):,}"
                losses = [
                    f"{at_the_end(seeds, f'transition_{name}').mean():.2g}" for name in ("sampled", "mean", "copy")
                ]
                score = at_the_end(seeds, "last_100")
                against = ""
                if arm != "deep_spi" and min(len(published), len(seeds)) > 1:
                    base = at_the_end(published, "last_100")
                    against = cell(*difference(score, base), "+z.1f")
                    if varies(score, base):
                        against += f", p {stats.ttest_ind(score, base, equal_var=False).pvalue:.3f}"
                ratio = geometric(at_the_end(seeds, "ratio"))
                name = [task.env_id, length, ARM_NAMES[arm], str(len(seeds))]
                table.append([*name, *losses, ratio, "" if np.isnan(score).any() else f"{score.mean():.1f}", against])
    header = ["task", "steps", "arm", "seeds", "sampled", "mean", "copying", "mean : copying", "return", "− published"]
    return markdown(header, table)


def reward_table() -> str:
    """Markdown: ℓ_R beside that of always predicting 0, at the end of training, published settings."""
    table = []
    for suite in STUDY:
        for task in SUITES[suite].tasks:
            seeds = runs(suite, task.env_id, "deep_spi")
            if seeds:
                l_r, zero = (at_the_end(seeds, name) for name in ("reward", "reward_zero"))
                length = f"{int(next(iter(seeds.values()))[0]['steps']):,}"
                row = [task.env_id, length, str(len(seeds)), f"{l_r.mean():.2g}", f"{zero.mean():.2g}"]
                table.append([*row, geometric(l_r / zero)])
    return markdown(["task", "steps", "seeds", "R̄", "always 0", "R̄ : always 0"], table)


def draw() -> None:
    """ℓ_P of P̄'s mean over that of copying, over training: a panel a task, the geometric mean of each arm's seeds."""
    tasks = [(suite, task.env_id) for suite in STUDY[:2] for task in SUITES[suite].tasks]
    figure, axes = plt.subplots(1, len(tasks), figsize=(12, 3.8), layout="constrained")
    for axis, (suite, task) in zip(axes, tasks, strict=True):
        for arm, name in ARM_NAMES.items():
            seeds = runs(suite, task, arm)
            if not seeds:
                continue
            ratios = np.log([[float(row["ratio"]) for row in rows] for rows in seeds.values()])  # (seeds, 10)
            steps = int(next(iter(seeds.values()))[0]["steps"]) * np.arange(1, TENTHS + 1) / TENTHS
            axis.plot(steps, np.exp(ratios.mean(0)), "o-", ms=3, color=COLOURS[arm], label=name)
            if len(seeds) > 1:
                half = stats.t.ppf(0.975, len(seeds) - 1) * ratios.std(0, ddof=1) / np.sqrt(len(seeds))
                low, high = np.exp(ratios.mean(0) - half), np.exp(ratios.mean(0) + half)
                axis.fill_between(steps, low, high, color=COLOURS[arm], alpha=0.15)
        axis.axhline(1, color="black", lw=1, ls="--")
        axis.set(title=task, xlabel="agent steps", yscale="log")
    axes[0].set_ylabel("ℓ_P of P̄'s mean : of copying z")
    axes[-1].legend(fontsize=8)
    save_figure(figure, RESULTS / "transition.png")


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmark.studies.transition", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the results folder of benchmark.run")
    print(f"{collect(parser.parse_args(words).folder)} finished runs in {FILE}")
    draw()
    print(transition_table(), reward_table(), sep="\n\n")


if __name__ == "__main__":
    main()
