"""Do two algorithms of a suite differ? python -m benchmark.differences benchmark/results/suites/early

Protocol, fixed before the runs of suite `early`. Two outcomes of a run: its score, the mean return of its last 100
games, which is the primary one, and the mean return of all its games, which tells how fast it learned. Each comparison
is the difference of two means over seeds, with Welch's 95 % interval. What such a comparison could have seen is the
difference that a t test at the 5 % level would have found in 80 % of repetitions, were the runs' spread the true one.
A default looks worse than its alternative if an interval lies below 0, or if both differences lie more than 5 % of the
alternative's mean below 0; then it is not to be the default.

Suite `control` has the same two outcomes on each of its tasks, and two comparisons: Deep SPI with PPO, which tells what
the world model does, and with the additive placement, which tells what the clip does. This was fixed when 34 of its 180
runs had been made and none looked at. Of so many intervals one in twenty misses 0 by chance.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from benchmark.collect import markdown, mean_interval
from benchmark.report_runs import Run, read_results

COMPARISONS = {  # of suite `early`: what is asked, the default, its alternative
    "PPO, bf16 − float32": ("ppo", "ppo-fp32"),
    "Deep SPI, chunks of 8 − of 1": ("deep_spi", "deep_spi-chunk-1"),
    "PPO, float32 − Stable-Baselines3's": ("ppo-fp32", "sb3"),
    "Deep SPI − PPO": ("deep_spi", "ppo"),
    "Deep SPI − DeepMDP": ("deep_spi", "deepmdp"),
}
PLACEMENTS = {"PPO": "ppo", "additive": "additive", "Deep SPI": "deep_spi"}  # of suite `control`
OUTCOMES = {"last 100 games": lambda run: run.last, "all games": lambda run: run.returns.mean()}
LEVEL, POWER = 0.05, 0.8


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean of a (n,) less that of b (m,), and Welch's 95 % interval of it: nan if a or b is a single number."""
    if a.std() == b.std() == 0 and min(len(a), len(b)) > 1:  # all runs perfect, say: there is no t statistic
        return (a.mean() - b.mean(),) * 3
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - LEVEL)
    return a.mean() - b.mean(), low, high


def visible_effect(a: np.ndarray, b: np.ndarray) -> float:
    """The difference that a t test of such samples finds with probability POWER, given their pooled deviation."""
    n, m = len(a), len(b)
    freedom = n + m - 2
    critical = stats.t.ppf(1 - LEVEL / 2, freedom)

    def shortfall(noncentrality: float) -> float:
        found = stats.nct.sf(critical, freedom, noncentrality) + stats.nct.cdf(-critical, freedom, noncentrality)
        return found - POWER

    pooled = math.sqrt(((n - 1) * a.var(ddof=1) + (m - 1) * b.var(ddof=1)) / freedom)
    return optimize.brentq(shortfall, 0.1, 8) * pooled * math.sqrt(1 / n + 1 / m)


def score_table(runs: list[Run]) -> str:
    """Markdown: each algorithm's outcomes, mean and Student's 95 % interval over seeds, and every seed's score."""
    rows = []
    for algorithm in dict.fromkeys(run.algorithm for run in runs):
        own = [run for run in runs if run.algorithm == algorithm]
        cells = []
        for outcome in OUTCOMES.values():
            values = np.array([outcome(run) for run in own])
            low, high = mean_interval(values)
            cells.append(f"{values.mean():.0f}" + (f" [{low:.0f}, {high:.0f}]" if len(own) > 1 else ""))
        games = f"{min(run.episodes for run in own)} to {max(run.episodes for run in own)}"
        rows.append([algorithm, str(len(own)), *cells, ", ".join(f"{run.last:.0f}" for run in own), games])
    return markdown(["algorithm", "seeds", *OUTCOMES, "each seed's last 100", "games of a run"], rows)


def difference_table(runs: list[Run]) -> str:
    """Markdown: every comparison of which there are two runs of each side or more."""
    rows = []
    for question, sides in COMPARISONS.items():
        for name, outcome in OUTCOMES.items():
            a, b = (np.array([outcome(run) for run in runs if run.algorithm == side]) for side in sides)
            if min(len(a), len(b)) > 1:
                mean, low, high = difference(a, b)
                share = f"{mean / abs(b.mean()):+.0%}"
                visible = f"{visible_effect(a, b):.0f}"
                rows.append(
                    [question, name, f"{len(a)}, {len(b)}", f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]", share, visible]
                )
    header = ["comparison", "outcome", "seeds", "difference [95 % interval]", "of the latter's mean", "could have seen"]
    return markdown(header, rows)


def placement_table(runs: list[Run]) -> str:
    """Markdown: per task and outcome the mean of each placement over seeds, and how far Deep SPI is from the others."""

    def cell(mean: float, low: float, high: float, sign: str = "") -> str:
        return f"{mean:{sign}.1f}" + ("" if math.isnan(low) else f" [{low:{sign}.1f}, {high:{sign}.1f}]")

    rows = []
    for task in dict.fromkeys(run.task for run in runs):
        for outcome_name, outcome in OUTCOMES.items():
            scores = {
                name: np.array([outcome(run) for run in runs if (run.task, run.algorithm) == (task, algorithm)])
                for name, algorithm in PLACEMENTS.items()
            }
            seeds = ", ".join(str(len(values)) for values in scores.values())
            means = [cell(values.mean(), *mean_interval(values)) for values in scores.values()]
            differences = [cell(*difference(scores["Deep SPI"], scores[name]), "+") for name in ("PPO", "additive")]
            rows.append([task, outcome_name, seeds, *means, *differences])
    return markdown(["task", "outcome", "seeds", *PLACEMENTS, "Deep SPI − PPO", "Deep SPI − additive"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmark.differences", description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="folder of suite `control`, or of one with runs of one task")
    found = read_results(parser.parse_args().suite).runs
    if {run.algorithm for run in found} <= set(PLACEMENTS.values()):
        print(placement_table(found))
    else:
        print(f"{score_table(found)}\n\n{difference_table(found)}")
