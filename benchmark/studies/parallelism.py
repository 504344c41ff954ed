"""Suites `parallelism-pong` and `parallelism-lunar`: python -m benchmark.studies.parallelism FOLDER

FOLDER has the suites' folders in it (runs/benchmark). Keeps their finished runs in results/suites, and what their
rollouts covered and their world models paid in each tenth of training in results/parallelism.csv. The tables come from
these. The protocol is in benchmark/PROTOCOL.md.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from benchmark.common import RESULTS, markdown, mean_interval, read_events, read_table
from benchmark.launch.keep import keep
from benchmark.report.scores import FINAL, LAST, Scores, cell, difference, read_scores, visible_cell
from benchmark.studies.transition import LATENT_SIZE, TENTHS, tenths
from benchmark.suites import SHAPES

FOLDER, FILE = RESULTS / "suites", RESULTS / "parallelism.csv"
STUDY = "parallelism-lunar", "parallelism-pong"
KEY = ("suite", "algorithm", "task", "seed")
METRICS = {  # column → metric; PPO has the first two
    "distinct": "coverage/distinct",
    "latent_variance": "coverage/latent_variance",
    "transition_mean": "world_model/transition_loss_mean",
    "transition_copy": "world_model/transition_loss_copy",
    "reward": "world_model/reward_loss",
    "reward_zero": "world_model/reward_loss_zero",
}
FORMS = {"distinct": ".3f", "latent_variance": ".2g"}
PAIRS = ("transition_mean", "transition_copy"), ("reward", "reward_zero")
NAMES = {"ppo": "PPO", "deep_spi": "Deep SPI"}


def rows_of(suite: str, run_dir: Path) -> list[dict]:
    """Ten rows of a finished run: medians over each tenth of its steps, losses of P̄ per dimension of the latent."""
    events = read_events(run_dir)
    env_id = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["args"]["env_id"]
    key = dict(zip(KEY, (suite, *run_dir.parts[-3:]), strict=True))
    last_step = int(events["charts/SPS"][0][-1])
    columns = {name: tenths(*events[metric], last_step) for name, metric in METRICS.items() if metric in events}
    for name in columns.keys() & {"transition_mean", "transition_copy"}:
        columns[name] = columns[name] / LATENT_SIZE[env_id]
    empty = dict.fromkeys(METRICS, "")
    return [
        key | {"tenth": i + 1} | empty | {name: f"{column[i]:.6g}" for name, column in columns.items()}
        for i in range(TENTHS)
    ]


def collect(folder: Path) -> int:
    """Keep the finished runs and their rows, in place of those of the same runs; return the runs' number."""
    found, number = [], 0
    for suite in (suite for suite in STUDY if (folder / suite).is_dir()):
        number += keep(folder / suite, FOLDER / suite)
        done = (path.parent for path in (folder / suite).glob("*/*/*/done.json"))
        found += [row for run_dir in done if ".broken-" not in run_dir.name for row in rows_of(suite, run_dir)]
    if not found:
        raise SystemExit(f"error: FOLDER: no finished run of {', '.join(STUDY)} in {folder}")
    new = {tuple(row[name] for name in KEY) for row in found}
    found += [row for row in read_table(FILE) if tuple(row[name] for name in KEY) not in new]
    with open(FILE, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(found, key=lambda row: (*(row[name] for name in KEY), int(row["tenth"]))))
    return number


def scores_of(suite: str) -> Scores:
    """Every outcome of the suite's kept runs; nothing if there are none."""
    return read_scores(FOLDER / suite) if any((FOLDER / suite).glob("*/*/*/done.json")) else {}


def arms() -> list[tuple[str, str, str]]:
    """The study's arms in the order of its tables: script, shape, algorithm's name in the suites."""
    return [(script, shape, f"{script}-{shape}") for script in NAMES for shape in SHAPES]


def column(key: tuple, tenth: int, name: str) -> np.ndarray:
    """A column's values in one tenth, (seeds,), of the runs of a (suite, algorithm, task)."""
    rows = (row for row in read_table(FILE) if tuple(row[each] for each in KEY[:3]) == key)
    return np.array([float(row[name]) for row in rows if int(row["tenth"]) == tenth and row[name]])


def score_table() -> str:
    """Markdown: what each shape scored, what its rollouts covered, and its losses beside those of trivial predictors.

    Means over seeds; with Student's 95 % interval for the scores.
    """
    rows = []
    for suite in STUDY:
        for task, algorithms in scores_of(suite).items():
            for script, shape, name in (arm for arm in arms() if arm[2] in algorithms):
                own = algorithms[name]
                means = [
                    cell(own[outcome].mean(), *mean_interval(own[outcome]), "z.1f") if outcome in own else ""
                    for outcome in (FINAL, LAST)
                ]
                of = {each: [column((suite, name, task), tenth, each) for tenth in (2, TENTHS)] for each in METRICS}
                covered = [" → ".join(f"{x.mean():{form}}" for x in of[each]) for each, form in FORMS.items()]
                paid = [
                    f"{of[own][1].mean():.2g} : {of[trivial][1].mean():.2g}" if len(of[own][1]) else ""
                    for own, trivial in PAIRS
                ]
                shape = shape.replace("x", " × ")
                rows.append([task, NAMES[script], shape, str(len(own[LAST])), *means, *covered, *paid])
    header = ["task", "algorithm", "N × T", "seeds", f"{FINAL}, 64 games", LAST, "distinct", "variance of z"]
    header += ["ℓ_P of P̄'s mean : copying", "ℓ_R : always 0"]
    return markdown(header, rows) if rows else "None yet."


def difference_table() -> str:
    """Markdown: 128 × 8 - 8 × 128, of what there are two runs of each side or more, by Welch's test."""
    rows = []
    for suite in STUDY:
        for task, algorithms in scores_of(suite).items():
            for script, name in NAMES.items():
                for outcome in (FINAL, LAST):
                    wide, long = (
                        algorithms.get(f"{script}-{shape}", {}).get(outcome, ()) for shape in ("128x8", "8x128")
                    )
                    if min(len(wide), len(long)) > 1:
                        interval = cell(*difference(wide, long), "+z.1f")
                        seeds = f"{len(wide)}, {len(long)}"
                        rows.append([task, name, outcome, seeds, interval, visible_cell(wide, long, "z.1f")])
    header = ["task", "algorithm", "outcome", "seeds", "128 × 8 − 8 × 128 [95 % interval]", "could have seen"]
    return markdown(header, rows) if rows else "None yet."


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmark.studies.parallelism", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="benchmark.run's results, with the suites in it")
    print(f"{collect(parser.parse_args(words).folder)} finished runs, in {FILE}")
    print(score_table(), difference_table(), sep="\n\n")


if __name__ == "__main__":
    main()
