"""Do two algorithms of a suite differ? python -m benchmark.differences benchmark/results/suites/early

A comparison is the difference of two means over seeds, with Welch's 95 % interval. What it could have seen is the
difference that Welch's test at the 5 % level would find in 80 % of repetitions if the runs' spread were the true one,
of which three runs give only a rough idea.

Suite `early`, protocol. Outcomes of a run: the mean return of its final policy, actions sampled, in 64 new games
(`python evaluate.py RUN --episodes 64 --policy sampled`), which is the primary one; that of its last 100 games in
training; and that of all its games in training. The last two were fixed before any run was looked at. They say less
than they seem to: a run has 2,336 steps of each of 128 games, so that most of its last 100 games began with the
untrained policy. This was noticed when the runs of PPO had been looked at; the first outcome was then added, and every
run made (or, for PPO, made again) with its final policy kept. It was fixed when two final policies had been evaluated,
one of Deep SPI and one of SB3. A default is found worse than its alternative, and is not to be the default, if an
interval lies below 0, or if all three differences lie more than 5 % of the alternative's mean below 0. Otherwise it
stays, because it is the faster: that is not a proof of equality. The rule is for settings. Deep SPI, DeepMDP and PPO
are methods, each with settings of its own: DeepMDP plays 64 games side by side, so that its games in training compare
with nobody's. (These two sentences are later than the runs.)

Suite `control`, protocol. The mean return of the last 100 games and of all games in training, on each task; Deep SPI
against PPO tells what the world model does, against the additive placement what the clip does. The primary outcome is
the last 100 games of LunarLander-v3-sticky0.25, the hardest task; all others are exploratory, and of their 22 intervals
one is expected to miss 0 by chance. This was fixed when 34 of the 180 runs, those of seeds 1 and 2, had been looked at.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from benchmark.collect import markdown, mean_interval, read_table
from benchmark.report_runs import Run, read_results
from benchmark.suites import CONTROL_TASKS, SOLVED_AT

COMPARISONS = {  # of suite `early`: what is asked, the default, its alternative
    "PPO, bf16 − float32": ("ppo", "ppo-fp32"),
    "Deep SPI, chunks of 8 − of 1": ("deep_spi", "deep_spi-chunk-1"),
    "PPO, float32 − Stable-Baselines3's": ("ppo-fp32", "sb3"),
    "Deep SPI − PPO": ("deep_spi", "ppo"),
    "Deep SPI − DeepMDP": ("deep_spi", "deepmdp"),
}
PLACEMENTS = {"PPO": "ppo", "additive": "additive", "Deep SPI": "deep_spi"}  # of suite `control`
OUTCOMES = FINAL, LAST, ALL = "final policy", "last 100 games", "all games"
SEED = "seed"  # stands beside the outcomes
LEVEL, POWER, REPETITIONS = 0.05, 0.8, 20_000

Scores = dict[str, dict[str, dict[str, np.ndarray]]]  # task → algorithm → outcome → its value for each seed


def final_returns(suite: Path, run: Run) -> np.ndarray:
    """Returns of the games that the run's final policy played anew, (games,): none if it was not evaluated."""
    rows = read_table(suite / run.algorithm / run.task / str(run.seed) / "evaluation.csv")
    return np.array([float(row["return"]) for row in rows if row["policy"] == "sampled"])


def outcomes(suite: Path, run: Run) -> dict[str, float]:
    """A run's outcomes; that of its final policy only if it was evaluated."""
    returns = final_returns(suite, run)
    final = {FINAL: returns.mean()} if len(returns) else {}
    return final | {LAST: run.last, ALL: run.returns.mean(), SEED: run.seed}


def read_scores(suite: Path) -> Scores:
    """Every outcome that all seeds of an algorithm on a task have. Raises SystemExit(1) if the suite has no runs."""
    runs = defaultdict(lambda: defaultdict(list))
    for run in read_results(suite).runs:
        runs[run.task][run.algorithm].append(outcomes(suite, run))
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


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean of a (n,) less that of b (m,), and Welch's 95 % interval of it: nan where nothing varies, or n or m is 1."""
    mean, low, high = a.mean() - b.mean(), math.nan, math.nan
    if min(len(a), len(b)) > 1 and varies(a, b):
        low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - LEVEL)
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
        return (stats.ttest_ind(noise_a + effect, noise_b, axis=1, equal_var=False).pvalue < LEVEL).mean() - POWER

    return optimize.brentq(shortfall, 0, 20 * spread, xtol=1e-4 * spread)


def visible_cell(a: np.ndarray, b: np.ndarray, form: str) -> str:
    """The difference that could have been seen, where there is one."""
    visible = visible_effect(a, b)
    return "" if math.isnan(visible) else f"{visible:{form}}"


def cell(mean: float, low: float, high: float, form: str) -> str:
    """A mean and its interval, where there is one."""
    return f"{mean:{form}}" + (f" [{low:{form}}, {high:{form}}]" if low < high else "")


def score_table(scores: Scores) -> str:
    """Markdown, of a suite with one task: each algorithm's outcomes, mean and Student's 95 % interval over seeds."""
    (algorithms,) = scores.values()
    rows = []
    for algorithm, own in algorithms.items():
        means = [cell(own[name].mean(), *mean_interval(own[name]), ".0f") if name in own else "" for name in OUTCOMES]
        each = next(", ".join(f"{value:.0f}" for value in own[name]) for name in (FINAL, LAST) if name in own)
        rows.append([algorithm, str(len(own[LAST])), *means, each])
    return markdown(["algorithm", "seeds", *OUTCOMES, "each seed's first outcome"], rows)


def difference_table(scores: Scores) -> str:
    """Markdown, of a suite with one task: every comparison of which there are two runs of each side or more."""
    (algorithms,) = scores.values()
    rows = []
    for question, (default, alternative) in COMPARISONS.items():
        sides = algorithms.get(default, {}), algorithms.get(alternative, {})
        for name in (name for name in OUTCOMES if all(len(side.get(name, ())) > 1 for side in sides)):
            a, b = sides[0][name], sides[1][name]
            interval = difference(a, b)
            share = f"{interval[0] / abs(b.mean()):+.0%}"
            seeds, visible = f"{len(a)}, {len(b)}", visible_cell(a, b, ".0f")
            rows.append([question, name, seeds, cell(*interval, "+.0f"), share, visible])
    header = ["comparison", "outcome", "seeds", "difference [95 % interval]", "of the latter's mean", "could have seen"]
    return markdown(header, rows)


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
                row.append(cell(own.mean(), *mean_interval(own), ".1f") + solved)
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
                p = f", p {stats.ttest_ind(a, b, equal_var=False).pvalue:.3f}" if low < high else ""
                paired = ""
                if np.array_equal(ours[SEED], theirs[SEED]) and len(a) > 1 and np.ptp(a - b) > 0:
                    paired = "[{:+.1f}, {:+.1f}]".format(*mean_interval(a - b))
                row += [cell(mean, low, high, "+.1f") + p, paired, visible_cell(a, b, ".1f")]
            rows.append(row)
    columns = [column for name in ("PPO", "additive") for column in (f"Deep SPI − {name}", "paired", "could have seen")]
    return markdown(["task", "outcome", *columns], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmark.differences", description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="folder of suite `early` or `control`, or of another with one task")
    found = read_scores(parser.parse_args().suite)
    if all(set(PLACEMENTS.values()) <= algorithms.keys() for algorithms in found.values()):
        print(f"{placement_score_table(found)}\n\n{placement_difference_table(found)}")
    elif len(found) == 1:
        print(f"{score_table(found)}\n\n{difference_table(found)}")
    else:
        raise SystemExit("error: the tables are for one task, or for ppo, additive and deep_spi on each")
