"""Do two algorithms of a suite differ? python -m benchmark.differences benchmark/results/suites/early

A comparison is the difference of two means over seeds, with Welch's 95 % interval. What it could have seen is the
difference that Welch's test at the 5 % level would find in 80 % of repetitions if the runs' spread were the true one,
of which three runs give only a rough idea. Suites `control` and `early` have protocols (benchmark/studies) and tables
of their own, which any suite with their algorithms gets. With other algorithms too, or with `--baseline`, each is
compared with the baseline on each task.
"""

import argparse
from pathlib import Path

from benchmark.common import markdown, mean_interval
from benchmark.report.scores import FINAL, LAST, Scores, cell, difference, read_scores, visible_cell
from benchmark.studies import control, early

EARLY = [set(pair) for pair in early.COMPARISONS.values()]


def tables(scores: Scores, baseline: str) -> str:
    """Markdown, of any suite: per task the outcome of every algorithm, and its difference from the baseline.

    The outcome is that of the final policies where all of a task's runs have been evaluated, else of the last games.
    """
    rows = []
    for task, algorithms in scores.items():
        outcome = FINAL if all(FINAL in own for own in algorithms.values()) else LAST
        reference = algorithms.get(baseline, {}).get(outcome)
        for name, values in algorithms.items():
            own = values[outcome]
            row = [task, outcome, name, str(len(own)), cell(own.mean(), *mean_interval(own), "z,.1f")]
            compared = ["", ""]
            if reference is not None and name != baseline:
                compared = [cell(*difference(own, reference), "+z,.1f"), visible_cell(own, reference, "z,.1f")]
            rows.append(row + compared)
    header = ["task", "outcome", "algorithm", "seeds", "mean [95 % interval]", f"less {baseline}", "could have seen"]
    return markdown(header, rows)


def main(words: list[str] | None = None) -> None:
    """The command line. Raises SystemExit: 1 if the suite has no runs, 2 if it has none of the baseline."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.differences", description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="a suite's folder")
    parser.add_argument("--baseline", help="algorithm to compare with (default: ppo, or else the suite's first)")
    given = parser.parse_args(words)
    found = read_scores(given.suite)
    algorithms = dict.fromkeys(name for own in found.values() for name in own)
    if given.baseline not in (None, *algorithms):
        parser.error(f"--baseline: got {given.baseline!r}; allowed: {', '.join(algorithms)}")
    baseline = given.baseline or ("ppo" if "ppo" in algorithms else next(iter(algorithms)))
    known = set()  # the algorithms of the protocols' tables
    if not given.baseline and all(set(control.PLACEMENTS.values()) <= own.keys() for own in found.values()):
        known = set(control.PLACEMENTS.values())
        print(f"{control.placement_score_table(found)}\n\n{control.placement_difference_table(found)}\n")
    elif not given.baseline and len(found) == 1 and sum(p <= algorithms.keys() for p in EARLY) > 1:
        known = set().union(*EARLY)
        print(f"{early.score_table(found)}\n\n{early.difference_table(found)}\n")
    if not algorithms.keys() <= known:
        print(tables(found, baseline))
