"""DreamSPI on vectors: how far the actor may move, how far it plans: python -m benchmark.studies.planning FOLDER

Reads the finished runs of `dream_spi` in suite `control`, and those of suites `planning`, `planning-longer`,
`planning-published` and `planning-atari`, below FOLDER (runs/benchmark) into results/planning.csv: a row each, with how
the return went, what the actor did in imagination, and what the world model pays. Tables and pictures come from that
file; those of the control tasks also from results/suites/control and results/suites/control-dream_spi, where
`benchmark.keep` has put them. The protocol, with what decides, is in benchmark/PROTOCOL.md.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from benchmark.common import (
    CURVE_PARTS,
    RESULTS,
    circumstances,
    markdown,
    mean_interval,
    parts,
    read_episodes,
    read_events,
    read_table,
    settings_text,
)
from benchmark.report.pictures import COLOURS as METHOD_COLOURS
from benchmark.report.pictures import LINES, called, save_figure
from benchmark.report.scores import LAST, cell, difference, read_scores, visible_cell, welch
from benchmark.studies import control
from benchmark.suites import CLIPS, CONTROL_STEPS, HORIZONS, RANDOM_PLAYER, SOLVED_AT, SUITES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FILE = RESULTS / "planning.csv"
FOLDER = RESULTS / "suites" / "control-dream_spi"
STUDY = ("control", "planning", "planning-longer", "planning-published", "planning-atari")
TASKS = [task.env_id for task in SUITES["planning"].tasks]
MEASURES = {  # column → metric, of which the median over all iterations is taken
    "reward_loss": "world_model/reward_loss",
    "done_loss": "world_model/done_loss",
    "transition_loss": "world_model/transition_loss",
    "transition_copy": "world_model/transition_loss_copy",
    "done_rate": "imagination/done_rate",
    "real_done_rate": "imagination/real_done_rate",
    "imagined_return": "imagination/return",
    "real_return": "imagination/real_return",
    "return_error": "imagination/return_error",
    "ratio_max": "spi/planning_ratio_max",
    "ratio_mean": "spi/planning_ratio_mean",
    "inside": "spi/planning_inside",
    "latent_entropy": "world_model/latent_entropy",
    "dead_classes": "world_model/dead_classes",
    "explained_variance": "losses/explained_variance",
}
COLOURS = dict(zip(CLIPS, ("#0072B2", "#009E73", "#D55E00"), strict=True))
Rows = dict[int, dict[str, str]]  # of a cell: seed → its row


def fall(curve: np.ndarray) -> float:
    """The largest fall of a curve (n,) below an earlier value of it; 0 if it only rises."""
    return float((np.maximum.accumulate(curve) - curve).max())


def row_of(suite: str, run_dir: Path) -> dict:
    """One finished run."""
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    events, args, episodes = read_events(run_dir), config["args"], read_episodes(run_dir)
    env_id, last_step = args["env_id"], int(events["charts/SPS"][0][-1])
    curve = np.array([value for _, value in parts(episodes[:, 0], episodes[:, 1], last_step, CURVE_PARTS)])
    if env_id in SOLVED_AT:  # 0: a random player; 1: solves it
        curve = (curve - RANDOM_PLAYER[env_id]) / (SOLVED_AT[env_id] - RANDOM_PLAYER[env_id])
    key = {
        "suite": suite,
        "arm": run_dir.parts[-3],
        "task": run_dir.parts[-2],
        "seed": args["seed"],
        "steps": last_step,
    }
    key |= {"clip": args["imagination_clip_coef"], "horizon": args["horizon"]}
    went = {"last_100": episodes[-100:, 1].mean() if len(episodes) else np.nan}
    went |= {"mean": curve.mean(), "fall": fall(curve)} if len(curve) else {"mean": np.nan, "fall": np.nan}
    medians = {name: np.median(events[metric][1]) for name, metric in MEASURES.items()}
    medians["relative_error"] = medians["return_error"] / abs(medians["real_return"])
    numbers = {name: f"{value:.6g}" for name, value in (went | medians).items()}
    return key | numbers | circumstances(config) | {"settings": settings_text(args)}


def collect(folder: Path) -> int:
    """Add the finished runs below `folder` to the table, in place of rows of the same runs; return their number."""
    found = {}
    for suite in STUDY:
        for done in sorted((folder / suite).glob("*/*/*/done.json")):
            if ".broken-" not in done.parent.name and (suite != "control" or done.parent.parts[-3] == "dream_spi"):
                row = row_of(suite, done.parent)
                found[tuple(str(row[name]) for name in ("suite", "arm", "task", "seed"))] = row
    kept = {(row["suite"], row["arm"], row["task"], row["seed"]): row for row in read_table(FILE)}
    rows = [row for _, row in sorted((kept | found).items())]
    if not found:
        raise SystemExit(f"error: FOLDER: no finished run of {', '.join(STUDY)} in {folder}")
    if any(row.keys() != rows[0].keys() for row in rows):
        raise SystemExit(f"error: {FILE}: has other columns than these runs: move it away, and read all runs anew")
    with open(FILE, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len(found)


def runs(suite: str) -> dict[tuple[str, str], Rows]:
    """(task, arm) → the row of each seed."""
    found = defaultdict(dict)
    for row in read_table(FILE):
        if row["suite"] == suite:
            found[row["task"], row["arm"]][int(row["seed"])] = row
    return found


def column(rows: Rows, name: str) -> np.ndarray:
    """A column of the rows, in the order of the seeds."""
    return np.array([float(rows[seed][name]) for seed in sorted(rows)])


def by_seed(runs_of: dict, clip: float, horizon: int, name: str, task: str | None = None) -> dict[int, float]:
    """A column of one clip and horizon: of one task, or the mean over the tasks, of each seed that has them."""
    each = [runs_of[of, f"clip{clip:g}-h{horizon}"] for of in ([task] if task else TASKS)]
    seeds = sorted(set.intersection(*map(set, each)))
    return {seed: float(np.mean([float(rows[seed][name]) for rows in each])) for seed in seeds}


def cell_of(*words) -> np.ndarray:
    """The values of `by_seed`, in the order of the seeds."""
    return np.array(list(by_seed(*words).values()))


def control_table() -> str:
    """Markdown: which control tasks DreamSPI solves, beside PPO and Deep SPI in as many steps."""
    dreams, scores, table = runs("control"), read_scores(control.FOLDER), []
    for task in CONTROL_STEPS:
        rows = dreams[task, "dream_spi"]
        if not rows:
            continue
        ours, threshold = column(rows, "last_100"), SOLVED_AT[task]
        theirs = {name: scores[task][name][LAST] for name in ("deep_spi", "ppo")}
        line = [task, f"{int(next(iter(rows.values()))['steps']):,}", f"{threshold:g}"]
        for own in (ours, theirs["deep_spi"], theirs["ppo"]):
            line.append(f"{cell(own.mean(), *mean_interval(own), 'z.1f')}; {(own >= threshold).sum()} of {len(own)}")
        mean, low, high = difference(ours, theirs["deep_spi"])
        p = f", p {welch(ours, theirs['deep_spi']).pvalue:.3f}" if low < high else ""
        table.append([*line, cell(mean, low, high, "+z.1f") + p])
    header = ["task", "steps", "solved if", "DreamSPI; seeds that solve it", "Deep SPI", "PPO", "DreamSPI − Deep SPI"]
    return markdown(header, table)


def outcome() -> str:
    """The one outcome that decides: the fall at horizon 8, clip 0.01 - clip 0.1, of the seeds that have both."""
    small, large = (by_seed(runs("planning"), clip, 8, "fall") for clip in (0.01, 0.1))
    paired = np.array([small[seed] - large[seed] for seed in small if seed in large])
    return f"{cell(paired.mean(), *mean_interval(paired), '+z.2f')}, {len(paired)} seeds"


def planning_table() -> str:
    """Markdown: every clip and horizon, means over seeds (and over the tasks, where a column names none)."""
    found, table = runs("planning"), []
    for clip in CLIPS:
        for horizon in HORIZONS:
            if not all(found[task, f"clip{clip:g}-h{horizon}"] for task in TASKS):
                continue
            solved = []
            for task in TASKS:
                own = cell_of(found, clip, horizon, "last_100", task)
                solved.append(f"{own.mean():z.0f}; {(own >= SOLVED_AT[task]).sum()} of {len(own)}")
            mean, down = (cell_of(found, clip, horizon, name) for name in ("mean", "fall"))
            numbers = [
                cell(mean.mean(), *mean_interval(mean), "z.2f"),
                cell(down.mean(), *mean_interval(down), "z.2f"),
                f"{cell_of(found, clip, horizon, 'relative_error').mean():.2f}",
                *(f"{cell_of(found, clip, horizon, name).mean():.2g}" for name in ("reward_loss", "transition_loss")),
                *(f"{cell_of(found, clip, horizon, name).mean():.2f}" for name in ("ratio_max", "inside")),
            ]
            table.append([f"{clip:g}", str(horizon), *solved, *numbers])
    header = ["clip", "H", *(f"{task}, last 100; solved" for task in TASKS), "mean", "fall"]
    return markdown([*header, "error of the imagined return", "ℓ_R", "ℓ_P", "largest ratio", "inside"], table)


def longer_table() -> str:
    """Markdown: which control tasks DreamSPI solves in more steps or with a longer horizon, and its losses."""
    table = []
    for (task, _), rows in sorted(runs("planning-longer").items()):
        last, any_row = column(rows, "last_100"), next(iter(rows.values()))
        mean = cell(last.mean(), *mean_interval(last), "z.1f")
        solved = f"{(last >= SOLVED_AT[task]).sum()} of {len(last)}"
        numbers = [f"{column(rows, name).mean():.2g}" for name in ("fall", "relative_error", "reward_loss")]
        losses = "; ".join(f"{column(rows, name).mean():.2g}" for name in ("transition_loss", "transition_copy"))
        key = [task, any_row["horizon"], f"{int(any_row['steps']):,}", f"{SOLVED_AT[task]:g}"]
        table.append([*key, mean, ", ".join(f"{value:z.0f}" for value in last), solved, *numbers, losses])
    header = ["task", "H", "steps", "solved if", "last 100 games", "each seed", "solve it", "fall"]
    return markdown([*header, "error of the imagined return", "ℓ_R", "ℓ_P; no change"], table)


def processor_table() -> str:
    """Markdown: the settings of `longer_table` again, on a processor that rounds otherwise."""
    runs_of = defaultdict(list)
    for row in read_table(RESULTS / "dream_spi_processor.csv"):  # started by hand, one torch thread
        runs_of[row["task"], row["horizon"]].append([float(row[name]) for name in ("last_100", "best_100")])
    table = []
    for (task, horizon), returns in sorted(runs_of.items()):
        last, best = np.array(returns).T
        each = [", ".join(f"{value:z.0f}" for value in values) for values in (last, best)]
        table.append([task, horizon, *each, f"{(last >= SOLVED_AT[task]).sum()} of {len(last)}"])
    return markdown(["task", "H", "last 100 games, each seed", "best 100 games on the way", "solve it"], table)


def horizons_table() -> str:
    """Markdown: the last 100 games with horizon 15 less those with 8, in as many steps, by Welch's test."""
    found, table = runs("planning-longer"), []
    for task in (task.env_id for task in SUITES["planning-longer"].tasks):
        short = found[task, "dream_spi"] or runs("control")[task, "dream_spi"]
        a, b = (column(rows, "last_100") for rows in (found[task, "dream_spi-h15"], short))
        p, steps = welch(a, b).pvalue, int(next(iter(short.values()))["steps"])
        seen = visible_cell(a, b, "z.1f")
        table.append(
            [task, f"{steps:,}", f"{len(a)}, {len(b)}", f"{cell(*difference(a, b), '+z.1f')}, p {p:.3f}", seen]
        )
    return markdown(["task", "steps", "seeds", "H 15 − H 8 [95 % interval]", "could have seen"], table)


def published_table() -> str:
    """Markdown: what each thing that the published code does otherwise changes, on CartPole-v1."""
    found, table = runs("planning-published"), []
    (task,) = SUITES["planning-published"].tasks
    base = found[task.env_id, "dream_spi"]
    for arm in SUITES["planning-published"].algorithms:
        rows = found[task.env_id, arm]
        if not rows:
            continue
        last, mean = column(rows, "last_100"), column(rows, "mean")
        rates = f"{column(rows, 'done_rate').mean():.2g}; {column(rows, 'real_done_rate').mean():.2g}"
        losses = [f"{column(rows, name).mean():.2g}" for name in ("reward_loss", "transition_loss")]
        against = "" if arm == "dream_spi" else cell(*difference(mean, column(base, "mean")), "+z.2f")
        solved = f"{last.mean():z.0f}; {(last >= SOLVED_AT[task.env_id]).sum()} of {len(last)}"
        name = {"dream_spi": "the script", "published": "all four"}.get(arm, f"`--{arm}`")
        table.append([name, solved, f"{mean.mean():z.2f}", against, rates, *losses])
    header = ["", "last 100; solved", "mean return", "− the script", "imagined; real ends a step", "ℓ_R", "ℓ_P"]
    return markdown(header, table)


def atari_table() -> str:
    """Markdown: what the first steps of DreamSPI on Atari know and do."""
    table = []
    for (task, _), rows in runs("planning-atari").items():
        for row in rows.values():
            names = ("transition_loss", "transition_copy", "done_rate", "real_done_rate", "imagined_return")
            names += ("real_return", "return_error", "latent_entropy", "dead_classes", "inside")
            last = "no game ended" if row["last_100"] == "nan" else f"{float(row['last_100']):.1f}"
            table.append([task, f"{int(row['steps']):,}", last, *(f"{float(row[name]):.2g}" for name in names)])
    header = ["game", "steps", "last 100 games", "ℓ_P", "no change", "imagined ends a step", "real", "imagined return"]
    return markdown([*header, "real", "error", "entropy", "dead classes", "inside"], table)


def draw() -> None:
    """The mean and the largest fall of the normalised return over the horizon, a line for each clip, a row a task."""
    found = runs("planning")
    figure, axes = plt.subplots(len(TASKS), 2, figsize=(9, 3 * len(TASKS)), sharex=True, layout="constrained")
    for line, task in zip(axes, TASKS, strict=True):
        for axis, name in zip(line, ("mean", "fall"), strict=True):
            for clip, style, shift in zip(CLIPS, ("-", "--", ":"), (-0.12, 0, 0.12), strict=True):
                cells = [cell_of(found, clip, horizon, name, task) for horizon in HORIZONS]
                means, x = np.array([own.mean() for own in cells]), np.array(HORIZONS) + shift
                bars = np.abs(np.array([mean_interval(own) for own in cells]).T - means)
                axis.errorbar(
                    x, means, bars, color=COLOURS[clip], ls=style, marker="o", ms=4, capsize=2, label=f"{clip:g}"
                )
            axis.set_title(f"{task}: {'mean return' if name == 'mean' else 'largest fall'}", fontsize=10)
    for axis in axes[-1]:
        axis.set(xlabel="horizon H", xticks=HORIZONS)
    axes[0, 0].legend(title="clip", fontsize=8)
    figure.supylabel("normalised return")
    save_figure(figure, RESULTS / "planning.png")


def draw_control() -> None:
    """Return over steps of DreamSPI, Deep SPI and PPO: means over seeds with their intervals, a panel a task."""
    table, dreams = control.curves(("ppo", "deep_spi")), control.curves(("dream_spi",), FOLDER)
    tasks = [task for task in CONTROL_STEPS if task in dreams]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.6), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for name, (steps, returns) in (table[task] | dreams[task]).items():
            look = {"color": METHOD_COLOURS[name], "ls": LINES.get(name, "-"), "label": called(name)}
            axis.plot(steps / 1000, returns.mean(axis=0), lw=1.5, **look)
            low, high = mean_interval(returns)
            axis.fill_between(steps / 1000, low, high, color=METHOD_COLOURS[name], alpha=0.2, lw=0)
        axis.axhline(SOLVED_AT[task], color="0.4", ls="--", lw=1)
        axis.set_title(task, fontsize=10)
    axes[0, 0].legend(fontsize=8)
    axes[0, 0].set_ylabel("return")
    figure.supxlabel("environment steps, in thousands")
    save_figure(figure, RESULTS / "planning_control.png")


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmark.studies.planning", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the results folder of benchmark.run")
    print(f"{collect(parser.parse_args(words).folder)} runs read; `python -m benchmark.figures` draws them")


if __name__ == "__main__":
    main()
