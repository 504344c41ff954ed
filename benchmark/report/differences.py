"""Do two algorithms of a suite differ? python -m benchmark.differences benchmark/results/suites/early

A comparison is the difference of two means over seeds, with Welch's 95 % interval. What it could have seen is the
difference that Welch's test at the 5 % level would find in 80 % of repetitions if the runs' spread were the true one,
of which three runs give only a rough idea. Suites `control` and `early` have protocols: benchmark/studies.
"""

import argparse
from pathlib import Path

from benchmark.report.scores import read_scores
from benchmark.studies import control, early


def main(words: list[str] | None = None) -> None:
    """The command line. Raises SystemExit(1) if the suite has no runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.differences", description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="folder of suite `early` or `control`, or of another with one task")
    found = read_scores(parser.parse_args(words).suite)
    if all(set(control.PLACEMENTS.values()) <= algorithms.keys() for algorithms in found.values()):
        print(f"{control.placement_score_table(found)}\n\n{control.placement_difference_table(found)}")
    elif len(found) == 1:
        print(f"{early.score_table(found)}\n\n{early.difference_table(found)}")
    else:
        raise SystemExit("error: the tables are for one task, or for ppo, additive and deep_spi on each")
