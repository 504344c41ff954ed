"""The report's statistics with their 95 % intervals, and as cells of its tables.

Those over games are rliable's (Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice,
NeurIPS 2021), but for the interval of the probability of improvement, which is Wilson's: a bootstrap of two seeds that
both win is [1, 1].
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from rliable import library, metrics
from scipy import stats

from benchmark.common import mean_interval
from benchmark.report.runs import FinishedRun, Results, name_runs

METRICS = ("IQM", "median", "mean", "optimality gap")


class Rectangle(NamedTuple):
    """Which runs enter a comparison over tasks: rliable needs every seed of an algorithm on every task."""

    tasks: list[str]
    seeds: dict[str, list[int]]  # algorithm → seeds that have every task; empty if there is nothing to compare
    remarks: list[str]  # what was left out for it


def choose_rectangle(results: Results, tasks: list[str], purpose: str) -> Rectangle:
    """Of `tasks`, those on which every algorithm has a score, and per algorithm the seeds that have all of them."""
    has = defaultdict(set)
    for run in results.runs:
        if not np.isnan(results.score(run)):
            has[run.algorithm, run.task].add(run.seed)
    algorithms = results.algorithms
    kept, seeds, remarks = [], {}, []
    for task in tasks:
        without = [algorithm for algorithm in algorithms if not has[algorithm, task]]
        if without:
            remarks.append(f"{purpose}: {task} is left out, as {', '.join(without)} has no score there.")
        else:
            kept.append(task)
    for algorithm in algorithms if kept else []:
        everywhere = set.intersection(*(has[algorithm, task] for task in kept))
        left_out = [(algorithm, task, seed) for task in kept for seed in has[algorithm, task] - everywhere]
        if left_out:
            remarks.append(f"{purpose}: left out, as not every task has that seed: {name_runs(left_out, tasks)}.")
        if everywhere:
            seeds[algorithm] = sorted(everywhere)
    return Rectangle(kept, seeds, remarks)


def matrices(
    runs: list[FinishedRun], rectangle: Rectangle, value: Callable[[FinishedRun], np.ndarray]
) -> dict[str, np.ndarray]:
    """Per algorithm the values of its runs, (seeds, tasks, ...)."""
    by_key = {run.key: run for run in runs}
    return {
        algorithm: np.array([[value(by_key[algorithm, task, seed]) for task in rectangle.tasks] for seed in seeds])
        for algorithm, seeds in rectangle.seeds.items()
    }


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """rliable's IQM over seeds and games at every point at once, (seeds, games, ...) → (...).

    SciPy's trimmed mean, which rliable calls, spends far longer on checks than on scores of this size.
    """
    flat = scores.reshape(-1, *scores.shape[2:])
    cut = len(flat) // 4
    return np.sort(flat, axis=0)[cut : len(flat) - cut].mean(axis=0)


def four_aggregates(scores: np.ndarray) -> np.ndarray:
    """METRICS of one algorithm, (seeds, games) → (4,)."""
    others = metrics.aggregate_median, metrics.aggregate_mean, metrics.aggregate_optimality_gap
    return np.array([interquartile_mean(scores), *(function(scores) for function in others)])


def share_above(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """rliable's score distribution, all thresholds at once: share of runs above each, (seeds, games) → (t,)."""
    return (scores.reshape(-1, 1) > thresholds).mean(axis=0)


def improvement(scores_x: np.ndarray, scores_y: np.ndarray) -> np.ndarray:
    """rliable's probability of improvement, all games at once: P(X > Y) + ½ P(X = Y), (seeds, games) twice → (1,)."""
    x, y = scores_x[:, None], scores_y[None]  # every seed of X against every seed of Y
    return np.array([(x > y).mean() + 0.5 * (x == y).mean()])


class Estimate(NamedTuple):
    """One or several numbers (n,) and the bounds of their 95 % intervals (n,), nan where a single seed allows none."""

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray


Estimates = dict[str, Estimate]  # of each algorithm
Curves = dict[str, tuple[np.ndarray, Estimate]]  # of each algorithm: where (n,), and what


def bounds(estimated: Estimate, i: int) -> tuple[float, float, float]:
    """Point, low and high of the i-th number of an estimate."""
    return estimated.point[i], estimated.low[i], estimated.high[i]


def number(value: float) -> str:
    """A number as a table shows it: four digits, but whole from 1,000 on, and never more than three decimals."""
    return f"{value:z,.{sum(abs(value) < size for size in (10, 100, 1000))}f}"


def with_interval(estimated: Estimate, i: int) -> str:
    """The i-th number of an estimate as a table shows it: `0.510 [0.400, 0.620]`, or the point alone."""
    point, low, high = bounds(estimated, i)
    return number(point) if np.isnan(low) else f"{number(point)} [{number(low)}, {number(high)}]"


def as_record(estimated: Estimate, i: int, name: str = "point") -> dict:
    """The i-th number of an estimate as cells of a CSV table."""
    return dict(zip((name, "low", "high"), bounds(estimated, i), strict=True))


def curve_records(curves: Curves, name: str) -> list[dict]:
    """Lines of a CSV table for curves over what the column `name` has."""
    return [
        {"algorithm": algorithm, name: x[i]} | as_record(estimated, i)
        for algorithm, (x, estimated) in curves.items()
        for i in range(len(x))
    ]


def estimate(scores: dict[str, np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], resamples: int) -> Estimates:
    """rliable's stratified bootstrap of `statistic` per matrix (seeds, games, ...)."""
    estimates = {}
    for name, matrix in scores.items():
        if len(matrix) < 2:
            estimates[name] = without_interval(statistic(matrix))
            continue
        np.random.seed(0)  # rliable draws from numpy's global generator and from no other
        points, intervals = library.get_interval_estimates({name: matrix}, statistic, reps=resamples)
        estimates[name] = Estimate(points[name], *intervals[name])
    return estimates


def mean_over_seeds(values: np.ndarray) -> Estimate:
    """Mean over seeds with its interval by Student's t, (seeds, n) → (n,); nan for a single seed."""
    return Estimate(values.mean(axis=0), *mean_interval(values))


def without_interval(point: np.ndarray) -> Estimate:
    """What a single seed says."""
    return Estimate(point, *np.full((2, *point.shape), np.nan))


def wilson_interval(share: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of so many trials (1927). scipy's takes whole numbers of successes only."""
    z2 = stats.norm.ppf((1 + level) / 2) ** 2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = np.sqrt(z2 * share * (1 - share) / trials + z2**2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)  # which it is, but for rounding


def improvement_estimate(scores_x: np.ndarray, scores_y: np.ndarray) -> Estimate:
    """The probability of improvement and its interval, (seeds, games) twice → (1,); nan if a side has one seed.

    Whatever X and Y are like, on one game it varies no more than a share p of min(m, n) trials, for m and n seeds: its
    variance is at most p (1 - p) / min(m, n) (Birnbaum and Klose, Bounds for the variance of the Mann-Whitney
    statistic, 1957; with ties Hoeffding, 1963, section 5: it is the mean, over all pairings of seeds, of that many
    independent comparisons). Games are independent and p (1 - p) is concave: so the mean over games varies no more than
    a share of all their trials.
    """
    point, seeds = improvement(scores_x, scores_y), min(len(scores_x), len(scores_y))
    if seeds < 2:
        return without_interval(point)
    return Estimate(point, *np.array(wilson_interval(point[0], seeds * scores_x.shape[1]))[:, None])
