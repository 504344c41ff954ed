"""Suite `control`: where the world model's losses stand, on vectors. Protocol:

The mean return of the last 100 games and of all games in training, on each task; Deep SPI
against PPO tells what the world model does, against the additive placement what the clip does. The primary outcome is
the last 100 games of LunarLander-v3-sticky0.25, the hardest task; all others are exploratory, and of their 22 intervals
one is expected to miss 0 by chance. This was fixed when 34 of the 180 runs, those of seeds 1 and 2, had been looked at.
"""

from collections import defaultdict

import matplotlib
import numpy as np

from benchmark.common import CURVE_PARTS, RESULTS, markdown, mean_interval, parts
from benchmark.report.pictures import COLOURS, save_figure
from benchmark.report.runs import read_results
from benchmark.report.scores import ALL, LAST, SEED, Scores, cell, difference, visible_cell, welch
from benchmark.suites import CONTROL_STEPS, CONTROL_TASKS, SOLVED_AT

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = RESULTS / "suites" / "control"
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


def draw() -> None:
    """Return over steps on the control tasks: each placement's mean over seeds, with its interval, and every seed."""
    curves = defaultdict(lambda: defaultdict(list))  # task → algorithm → {step: return} of each seed
    for run in read_results(FOLDER).runs:
        curve = parts(run.ends, run.returns, run.done["steps"], CURVE_PARTS)
        curves[run.task][run.algorithm].append(dict(curve))
    figure, axes = plt.subplots(2, len(CONTROL_STEPS), figsize=(11, 6), layout="constrained")
    for axis, task in zip(axes.T.flat, CONTROL_TASKS, strict=True):  # a column per environment
        axis.set(title=task.label)
        for name, algorithm in PLACEMENTS.items():
            colour = COLOURS[algorithm]
            seeds = curves[task.label][algorithm]
            steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
            returns = np.array([[seed[step] for step in steps] for seed in seeds])  # (seeds, steps)
            steps = np.array(steps) / 1000
            axis.plot(steps, returns.T, color=colour, alpha=0.2, linewidth=0.5)
            axis.fill_between(steps, *mean_interval(returns), color=colour, alpha=0.25, linewidth=0)
            axis.plot(steps, returns.mean(axis=0), color=colour, linewidth=1.5, label=f"{name}, {len(seeds)} seeds")
        axis.axhline(SOLVED_AT[task.env_id], color="0.4", linestyle="--", linewidth=1)
    axes[0, 0].legend(loc="lower right", fontsize="small")
    figure.supxlabel("environment steps, in thousands")
    figure.supylabel("return of the games that end there")
    save_figure(figure, RESULTS / "control.png")
