"""A suite's outcomes, and the difference of two algorithms' means over seeds with Welch's 95 % interval.

What a comparison could have seen is the difference that Welch's test at the 5 % level would find in 80 % of repetitions
if the runs' spread were the true one, of which three runs give only a rough idea.
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from benchmark.report.runs import FinishedRun, read_results

OUTCOMES = FINAL, LAST, ALL = "final policy", "last 100 games", "all games"
SEED = "seed"  # stands beside the outcomes
LEVEL, POWER, REPETITIONS = 0.05, 0.8, 20_000

Scores = dict[str, dict[str, dict[str, np.ndarray]]]  # task → algorithm → outcome → its value for each seed


def outcomes(run: FinishedRun) -> dict[str, float]:
    """A run's outcomes; that of its final policy only if it was evaluated."""
    final = {} if math.isnan(run.final) else {FINAL: run.final}
    return final | {LAST: run.last, ALL: run.returns.mean() if run.episodes else math.nan, SEED: run.seed}


def read_scores(suite: Path) -> Scores:
    """Every outcome that all seeds of an algorithm on a task have. Raises SystemExit(1) if the suite has no runs."""
    runs = defaultdict(lambda: defaultdict(list))
    for run in read_results(suite).runs:
        runs[run.task][run.algorithm].append(outcomes(run))
    if not runs:
        raise SystemExit(f"error: no finished run in {suite}")
    return {
        task: {
            algorithm: {
                name: np.array([seed[name] for seed in seeds])
                for name in (*OUTCOMES, SEED)
                if all(name in seed for seed in seeds)
            }
            for algorithm, seeds in algorithms.items()
        }
        for task, algorithms in runs.items()
    }


def varies(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a or b has values that differ; not if one of them is nan."""
    return bool(np.ptp(a) + np.ptp(b) > 0)


def welch(a: np.ndarray, b: np.ndarray):
    """Welch's t-test of the means of a (..., n) and b (..., m), as scipy's result: statistic, pvalue, interval.

    Where one side is a constant, Welch's formula is that of the other's mean alone: the test of one sample.
    """
    if np.ptp(b) == 0:
        return stats.ttest_1samp(a - b[..., :1], 0, axis=-1)
    if np.ptp(a) == 0:
        return stats.ttest_1samp(a[..., :1] - b, 0, axis=-1)
    return stats.ttest_ind(a, b, axis=-1, equal_var=False)


def difference(a: np.ndarray, b: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """Mean of a (n,) less that of b (m,), and Welch's interval of 1 - level: nan if nothing varies, or n or m is 1."""
    mean, low, high = a.mean() - b.mean(), math.nan, math.nan
    if min(len(a), len(b)) > 1 and varies(a, b):
        low, high = welch(a, b).confidence_interval(1 - level)
    return mean, low, high


def visible_effect(a: np.ndarray, b: np.ndarray) -> float:
    """The difference that Welch's test finds with probability POWER, by simulating normal samples that vary as a, b.

    nan where nothing varies, or a or b has one value or is not finite.
    """
    if min(len(a), len(b)) < 2 or not varies(a, b):
        return math.nan
    spread = a.std(ddof=1) + b.std(ddof=1)
    rng = np.random.default_rng(0)
    noise_a, noise_b = (x.std(ddof=1) * rng.standard_normal((REPETITIONS, len(x))) for x in (a, b))

    def shortfall(effect: float) -> float:
        return (welch(noise_a + effect, noise_b).pvalue < LEVEL).mean() - POWER

    return optimize.brentq(shortfall, 0, 20 * spread, xtol=1e-4 * spread)


def visible_cell(a: np.ndarray, b: np.ndarray, form: str) -> str:
    """The difference that could have been seen, where there is one."""
    visible = visible_effect(a, b)
    return "" if math.isnan(visible) else f"{visible:{form}}"


def cell(mean: float, low: float, high: float, form: str) -> str:
    """A mean and its interval, where there is one."""
    return f"{mean:{form}}" + (f" [{low:{form}}, {high:{form}}]" if low < high else "")
