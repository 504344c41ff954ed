"""The paper's figure 4, in its own configuration: python -m benchmark.studies.corridors FOLDER

Reads the finished runs of suites `corridors` and `corridors-search` below FOLDER (runs/benchmark) into
results/corridors.csv, a row for each, and its curve into results/corridors_curves.csv. Tables and picture come from
these files. The protocol, with what decides, is in benchmark/PROTOCOL.md.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch

from benchmark.common import (
    CURVE_PARTS,
    RESULTS,
    circumstances,
    markdown,
    mean_interval,
    parts,
    read_events,
    read_table,
    settings_text,
)
from benchmark.peers.deep_spi_corridors import Agent, Args
from benchmark.report.pictures import COLOURS, LINES, save_figure
from benchmark.report.scores import cell, difference, visible_cell
from benchmark.suites import SUITES
from confounding_gridworld import RIGHT, critical_distance, largest_drawdown, make_gridworld, value

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

FILE, CURVES = RESULTS / "corridors.csv", RESULTS / "corridors_curves.csv"
STUDY = ("corridors", "corridors-search")
KEY = ("suite", "arm", "task", "seed")
ARMS = {
    "ppo": "PPO",
    "additive": "additive",
    "deep_spi": "Deep SPI",
    "published-norm": "Deep SPI, published norm",
    "learned-dummies": "Deep SPI, dummies count",
}
LOOK = COLOURS | {"published-norm": "#CC79A7", "learned-dummies": "#000000"}
OUTCOMES = {"value": "corridors/value", "distance": "corridors/distance"}  # column → metric
LOSSES = {
    "transition_mean": "world_model/transition_loss_mean",
    "transition_copy": "world_model/transition_loss_copy",
    "reward": "world_model/reward_loss",
    "reward_zero": "world_model/reward_loss_zero",
}
PAPER = {"ppo": (4.8, "→ 0"), "deep_spi": (8.01, "> 0")}  # V and distance, second-hand


def rows_of(suite: str, run_dir: Path) -> tuple[dict, list[dict]]:
    """A finished run's row, with medians over its last tenth, and the rows of its curve, with means of fiftieths."""
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    events, args = read_events(run_dir), config["args"]
    steps, values = events[OUTCOMES["value"]]
    key = dict(zip(KEY, (suite, *run_dir.parts[-3:]), strict=True))
    last = {
        column: f"{np.median(events[metric][1][events[metric][0] > 0.9 * steps[-1]]):.6g}" if metric in events else ""
        for column, metric in (OUTCOMES | LOSSES).items()
    }
    row = key | {"steps": int(steps[-1])} | last | {"drawdown": f"{largest_drawdown(values):.6g}"}
    row["relative_distance"] = f"{relative_distance(run_dir, args['n_path'], args['epsilon'], args['gamma']):.6g}"
    curves = [parts(*events[metric], steps[-1], CURVE_PARTS) for metric in OUTCOMES.values()]
    curve = [
        key | {"step": step} | {column: f"{value:.6g}" for column, value in zip(OUTCOMES, (a, b), strict=True)}
        for (step, a), (_, b) in zip(*curves, strict=True)
    ]
    return row | circumstances(config) | {"settings": settings_text(args)}, curve


def relative_distance(run_dir: Path, n_path: int, epsilon: float, gamma: float) -> float:
    """φ's distance at the two '!' over the mean distance of two states, with the final weights: free of φ's scale."""
    agent = Agent(4, n_path)
    agent.load_state_dict(torch.load(run_dir / "agent.pt", map_location="cpu", weights_only=True))
    frames = torch.zeros(len(agent.pictures), 84, 84, 4, dtype=torch.uint8)
    frames[..., 1] = torch.arange(len(frames))[:, None, None]  # which picture
    with torch.no_grad():
        return critical_distance(agent.encode(frames).flatten(1), make_gridworld(n_path, epsilon, gamma))


def collect(folder: Path) -> int:
    """Add the finished runs below `folder` to both tables, in place of the same runs' rows; return their number."""
    found = [
        rows_of(suite, done.parent)
        for suite in STUDY
        for done in sorted((folder / suite).glob("*/*/*/done.json"))
        if ".broken-" not in done.parent.name
    ]
    if not found:
        raise SystemExit(f"error: FOLDER: no finished run of {', '.join(STUDY)} in {folder}")
    new = {tuple(row[name] for name in KEY) for row, _ in found}
    for path, rows in (FILE, [row for row, _ in found]), (CURVES, [point for _, curve in found for point in curve]):
        rows += [row for row in read_table(path) if tuple(row[name] for name in KEY) not in new]
        rows.sort(key=lambda row: (*(row[name] for name in KEY[:3]), int(row["seed"]), int(row.get("step", 0))))
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return len(found)


def column(suite: str, task: str, arm: str, name: str) -> np.ndarray:
    """A column's values, by seed; of no length if there is no such run."""
    rows = [row for row in read_table(FILE) if (row["suite"], row["task"], row["arm"]) == (suite, task, arm)]
    return np.array([float(row[name]) for row in sorted(rows, key=lambda row: int(row["seed"])) if row[name]])


def of_figure(arm: str, name: str) -> np.ndarray:
    """A column of an arm of the figure's own configuration, by seed."""
    return column("corridors", "Corridors-v0", arm, name)


def with_interval(values: np.ndarray, form: str) -> str:
    """Mean and Student's 95 % interval."""
    return cell(values.mean(), *mean_interval(values), form) if len(values) else ""


def table() -> str:
    """Markdown: each arm's value, distance and deepest fall, and its losses beside those of trivial predictors."""
    rows = []
    for arm, name in ARMS.items():
        value, paper = of_figure(arm, "value"), PAPER.get(arm, ("", ""))
        if not len(value):
            continue
        row = [name, str(len(value)), str(paper[0]), with_interval(value, ".2f"), f"{value.min():.2f}", paper[1]]
        distances = of_figure(arm, "distance"), of_figure(arm, "relative_distance")
        row += [with_interval(distances[0], ".3f"), with_interval(distances[1], ".2f")]
        row.append(with_interval(of_figure(arm, "drawdown"), ".2f"))
        pairs = ("transition_mean", "transition_copy"), ("reward", "reward_zero")
        losses = [[of_figure(arm, each) for each in pair] for pair in pairs]
        row += [f"{a.mean():.2g} : {b.mean():.2g}" if len(a) else "" for a, b in losses]
        rows.append(row)
    header = ["arm", "seeds", "V, paper", "V here", "least V", "distance, paper", "distance here", "relative"]
    return markdown([*header, "deepest fall of V", "ℓ_P : copying", "ℓ_R : always 0"], rows)


def difference_table() -> str:
    """Markdown: Deep SPI less each other arm, by Welch's test. The first row is the protocol's, for both outcomes."""
    rows = []
    for arm in (arm for arm in ARMS if arm != "deep_spi"):
        row = []
        for name in OUTCOMES:
            a, b = of_figure("deep_spi", name), of_figure(arm, name)
            if min(len(a), len(b)) > 1:
                row += [cell(*difference(a, b), "+z.3f"), visible_cell(a, b, "z.3f")]
        if row:
            rows.append([f"Deep SPI − {ARMS[arm].removeprefix('Deep SPI, ')}", f"{len(a)}, {len(b)}", *row])
    return markdown(["comparison", "seeds", "V", "could have seen", "distance", "could have seen"], rows)


def search_table() -> str:
    """Markdown: V of the last tenth in each setting of the search, as it is, and scaled: always RIGHT 0, the best 1."""
    rows = []
    for task in SUITES["corridors-search"].tasks:
        args = Args(**task.flags)
        low, high = reference_values(args.n_path, args.epsilon, args.gamma)
        cells = []
        for arm in SUITES["corridors-search"].algorithms:
            values, distances = (column("corridors-search", task.label, arm, name) for name in OUTCOMES)
            each = [f"{V:.2f} ({(V - low) / (high - low):z.2f})" for V in values]
            cells += [", ".join(each), ", ".join(f"{distance:.2g}" for distance in distances)]
        if any(cells):
            changes = ", ".join(f"`--{name.replace('_', '-')} {flag:g}`" for name, flag in task.flags.items())
            rows.append([changes, f"{low:.2f}", f"{high:.2f}", *cells])
    header = ["setting", "V of always RIGHT", "best V", "PPO: V (scaled)", "distance"]
    return markdown([*header, "Deep SPI: V (scaled)", "distance"], rows) if rows else "None yet."


def reference_values(n_path: int, epsilon: float, gamma: float) -> tuple[float, float]:
    """V of the initial cell of the policy that always goes RIGHT, and of the best one."""
    world = make_gridworld(n_path, epsilon, gamma)
    always = np.eye(4)[np.full(len(world.coords), RIGHT)]
    best = always
    while True:  # policy iteration
        V = value(world.P, world.R, best, gamma)
        improved = np.eye(4)[(world.R + gamma * world.P @ V).argmax(1)]
        if np.allclose(value(world.P, world.R, improved, gamma), V):
            return value(world.P, world.R, always, gamma)[world.start], V[world.start]
        best = improved


def draw() -> None:
    """Value and distance over training: each arm's mean over seeds, and its 95 % interval."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    rows = [row for row in read_table(CURVES) if row["suite"] == "corridors"]
    for axis, name in zip(axes, OUTCOMES, strict=True):
        for arm, called in ARMS.items():
            own = [row for row in rows if row["arm"] == arm]
            steps = sorted({int(row["step"]) for row in own})
            seeds = sorted({int(row["seed"]) for row in own})
            points = {(int(row["seed"]), int(row["step"])): float(row[name]) for row in own}
            curve = np.array([[points[seed, step] for step in steps] for seed in seeds])
            if not len(seeds):
                continue
            axis.plot(steps, curve.mean(0), LINES.get(arm, "-"), color=LOOK[arm], label=called)
            if len(seeds) > 2:  # the interval of two would fill the picture
                axis.fill_between(steps, *mean_interval(curve), color=LOOK[arm], alpha=0.15, linewidth=0)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
    for level in (4.8, 8.01):  # of always RIGHT, and of the best policy: what the paper has of PPO, and of Deep SPI
        axes[0].axhline(level, color="0.4", lw=1, ls="--")
    axes[0].set(xlabel="agent steps", ylabel="V of the initial cell")
    axes[1].set(xlabel="agent steps", ylabel="distance of φ at the two '!'", yscale="log")
    axes[0].legend(fontsize=8)
    save_figure(figure, RESULTS / "corridors.png")


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmark.studies.corridors", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the results folder of benchmark.run")
    print(f"{collect(parser.parse_args(words).folder)} finished runs in {FILE}")
    draw()
    print(table(), difference_table(), search_table(), sep="\n\n")


if __name__ == "__main__":
    main()
