"""Suite `control`: where the world model's losses stand, on vectors. Protocol:

The mean return of the last 100 games and of all games in training, on each task; Deep SPI
against PPO tells what the world model does, against the additive placement what the clip does. The primary outcome is
the last 100 games of LunarLander-v3-sticky0.25, the hardest task; all others are exploratory, and of their 22 intervals
one is expected to miss 0 by chance. This was fixed when 34 of the 180 runs, those of seeds 1 and 2, had been looked at.
"""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

import matplotlib
import numpy as np

from benchmark.common import CURVE_PARTS, RESULTS, markdown, mean_interval, parts
from benchmark.report.pictures import COLOURS, LINES, save_figure
from benchmark.report.runs import read_results
from benchmark.report.scores import ALL, LAST, SEED, Scores, cell, difference, visible_cell, welch
from benchmark.suites import CONTROL_STEPS, CONTROL_TASKS, SOLVED_AT

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = RESULTS / "suites" / "control"
GATED = RESULTS / "suites" / "gated"
PLACEMENTS = {"PPO": "ppo", "additive": "additive", "Deep SPI": "deep_spi"}  # of suite `control`


def placement_score_table(scores: Scores) -> str:
    """Markdown: per task and outcome each placement's mean and its interval over seeds; how many solve the task."""
    thresholds = {task.label: SOLVED_AT[task.env_id] for task in CONTROL_TASKS}
    rows = []
    for task, algorithms in scores.items():
        for outcome in (LAST, ALL):
            counts = outcome == LAST and task in thresholds
            row = [task, outcome, f">= {thresholds[task]:g}" if counts else ""]
            for algorithm in PLACEMENTS.values():
                own = algorithms[algorithm][outcome]
                solved = f"; {(own >= thresholds[task]).sum()} of {len(own)}" if counts else ""
                row.append(cell(own.mean(), *mean_interval(own), "z.1f") + solved)
            rows.append(row)
    return markdown(["task", "outcome", "solved if", *(f"{name}; seeds that solve it" for name in PLACEMENTS)], rows)


def placement_difference_table(scores: Scores) -> str:
    """Markdown: per task and outcome how far Deep SPI is from PPO and from the additive placement, by Welch's test.

    Beside it the 95 % interval of the same difference paired by seed, where both sides have the same seeds.
    """
    rows = []
    for task, algorithms in scores.items():
        for outcome in (LAST, ALL):
            row = [task, outcome]
            ours = algorithms[PLACEMENTS["Deep SPI"]]
            for name in ("PPO", "additive"):
                theirs = algorithms[PLACEMENTS[name]]
                a, b = ours[outcome], theirs[outcome]
                mean, low, high = difference(a, b)
                p = f", p {welch(a, b).pvalue:.3f}" if low < high else ""
                paired = ""
                if np.array_equal(ours[SEED], theirs[SEED]) and len(a) > 1 and np.ptp(a - b) > 0:
                    paired = "[{:+z.1f}, {:+z.1f}]".format(*mean_interval(a - b))
                row += [cell(mean, low, high, "+z.1f") + p, paired, visible_cell(a, b, "z.1f")]
            rows.append(row)
    columns = [column for name in ("PPO", "additive") for column in (f"Deep SPI − {name}", "paired", "could have seen")]
    return markdown(["task", "outcome", *columns], rows)


def gated_table(scores: Scores, of_gated: Scores) -> str:
    """Markdown: how the gated placement ends each task, against the other two (protocol: benchmark/PROTOCOL.md)."""
    rows = []
    for task in (task.label for task in CONTROL_TASKS if task.label in of_gated):
        own = of_gated[task]["gated"][LAST]
        row = [task, str(len(own)), cell(own.mean(), *mean_interval(own), "z.1f")]
        for name in ("Deep SPI", "additive"):
            other = scores[task][PLACEMENTS[name]][LAST]
            mean, low, high = difference(own, other)
            p = f", p {welch(own, other).pvalue:.3f}" if low < high else ""
            row += [cell(mean, low, high, "+z.1f") + p, visible_cell(own, other, "z.1f")]
        rows.append(row)
    columns = [column for name in ("Deep SPI", "additive") for column in (f"gated − {name}", "could have seen")]
    return markdown(["task", "seeds", "gated, last 100 games", *columns], rows)


def curves(
    algorithms: Collection[str] = PLACEMENTS.values(), folder: Path = FOLDER
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Task → algorithm → steps (points,) and returns (seeds, points), where every seed of every algorithm has games."""
    found = defaultdict(lambda: defaultdict(list))  # {step: return} of each seed, in the order of the seeds
    runs = (run for run in read_results(folder).runs if run.algorithm in algorithms)
    for run in sorted(runs, key=lambda run: run.seed):
        found[run.task][run.algorithm].append(dict(parts(run.ends, run.returns, run.done["steps"], CURVE_PARTS)))
    table = {}
    for task, own in found.items():
        steps = sorted(set.intersection(*(set(seed) for seeds in own.values() for seed in seeds)))
        of = {name: np.array([[seed[step] for step in steps] for seed in seeds]) for name, seeds in own.items()}
        table[task] = {name: (np.array(steps), returns) for name, returns in of.items()}
    return table


def draw() -> None:
    """Return over steps, mean over seeds and its interval; below it how far Deep SPI is from the others, by seed."""
    table = curves()
    heights = {"height_ratios": (3, 2, 3, 2)}
    figure, axes = plt.subplots(4, len(CONTROL_STEPS), figsize=(11, 10), gridspec_kw=heights, layout="constrained")
    pairs = (column[i : i + 2] for column in axes.T for i in (0, 2))  # a column per environment
    for (above, below), task in zip(pairs, CONTROL_TASKS, strict=True):
        ours = table[task.label][PLACEMENTS["Deep SPI"]][1]
        for name, algorithm in PLACEMENTS.items():
            steps, returns = table[task.label][algorithm]
            steps, colour = steps / 1000, COLOURS[algorithm]
            shaded = {"color": colour, "alpha": 0.25, "linewidth": 0}
            above.fill_between(steps, *mean_interval(returns), **shaded)
            line = {"color": colour, "linestyle": LINES.get(algorithm, "-"), "linewidth": 1.5}  # grey print tells them
            above.plot(steps, returns.mean(axis=0), label=name, **line)
            if name != "Deep SPI":
                below.fill_between(steps, *mean_interval(ours - returns), **shaded)
                below.plot(steps, (ours - returns).mean(axis=0), label=f"Deep SPI − {name}", **line)
        above.set_title(task.label)
        above.axhline(SOLVED_AT[task.env_id], color="0.4", linestyle="--", linewidth=1)
        below.axhline(0, color="0.4", linewidth=1)
        below.sharex(above)
        above.tick_params(labelbottom=False)
    for axis, label in zip(axes[:, 0], ("return", "difference") * 2, strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend(loc="lower right", fontsize="small")
    axes[1, 0].legend(loc="upper right", fontsize="small")
    figure.supxlabel("environment steps, in thousands")
    save_figure(figure, RESULTS / "control.png")
