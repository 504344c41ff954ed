"""Suite `mujoco`: continuous actions. Its protocol is in benchmark/PROTOCOL.md, under "Evidence at length"."""

from benchmark.common import RESULTS, markdown, mean_interval
from benchmark.report.scores import LAST, Scores, cell, difference, visible_cell

FOLDER = RESULTS / "suites" / "mujoco"
COMPARISONS = {  # what is asked: one side, the other
    "Deep SPI − PPO": ("deep_spi", "ppo"),
    "Deep SPI − additive": ("deep_spi", "additive"),
    "PPO − Stable-Baselines3's": ("ppo", "sb3"),
}


def score_table(scores: Scores) -> str:
    """Markdown: each algorithm's last 100 episodes on each task, mean with Student's 95 % interval, and every seed."""
    rows = []
    for task, algorithms in scores.items():
        for algorithm, outcomes in algorithms.items():
            own = outcomes[LAST]
            mean = cell(own.mean(), *mean_interval(own), "z.0f")
            rows.append([task, algorithm, str(len(own)), mean, ", ".join(f"{value:z.0f}" for value in own)])
    return markdown(["task", "algorithm", "seeds", "last 100 episodes [95 % interval]", "each seed"], rows)


def difference_table(scores: Scores) -> str:
    """Markdown: every comparison of which there are two runs of each side or more, by Welch's test."""
    rows = []
    for task, algorithms in scores.items():
        for question, names in COMPARISONS.items():
            a, b = (algorithms.get(name, {}).get(LAST, ()) for name in names)
            if min(len(a), len(b)) > 1:
                interval, seen = cell(*difference(a, b), "+z.0f"), visible_cell(a, b, "z.0f")
                rows.append([task, question, f"{len(a)}, {len(b)}", interval, seen])
    if not rows:
        return "None yet."
    return markdown(["task", "comparison", "seeds", "difference [95 % interval]", "could have seen"], rows)
