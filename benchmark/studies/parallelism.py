"""Suites `parallelism-pong` and `parallelism-lunar`: python -m benchmark.studies.parallelism FOLDER

FOLDER has the suites' folders in it (runs/benchmark). Keeps their finished runs in results/suites, and what their
rollouts covered and their world models paid in each tenth of training in results/parallelism.csv. The tables come from
these. The protocol is in benchmark/PROTOCOL.md.
"""

import argparse
from pathlib import Path

from benchmark.common import RESULTS, markdown, mean_interval
from benchmark.launch.keep import keep
from benchmark.report.runs import FinishedRun, read_results
from benchmark.report.scores import FINAL, LAST, LEVEL, Scores, cell, difference, read_scores, visible_cell
from benchmark.studies.by_tenths import add, column, rows_of
from benchmark.studies.long import score
from benchmark.studies.transition import TENTHS
from benchmark.suites import SHAPES

FOLDER, FILE = RESULTS / "suites", RESULTS / "parallelism.csv"
STUDY = "parallelism-lunar", "parallelism-pong"
KEY = ("suite", "algorithm", "task", "seed")
METRICS = {  # column → metric; PPO has the first three
    "distinct": "coverage/distinct",
    "observation_variance": "coverage/observation_variance",
    "latent_variance": "coverage/latent_variance",
    "transition_mean": "world_model/transition_loss_mean",
    "transition_copy": "world_model/transition_loss_copy",
    "reward": "world_model/reward_loss",
    "reward_zero": "world_model/reward_loss_zero",
}
FORMS = {"distinct": ".3f", "observation_variance": ".3g", "latent_variance": ".2g"}
PAIRS = ("transition_mean", "transition_copy"), ("reward", "reward_zero")
NAMES = {"ppo": "PPO", "deep_spi": "Deep SPI"}


def collect(folder: Path) -> int:
    """Keep the finished runs and their rows, in place of those of the same runs; return the runs' number."""
    suites = [suite for suite in STUDY if any((folder / suite).glob("*/*/*/done.json"))]
    if not suites:
        raise SystemExit(f"error: FOLDER: no finished run of {', '.join(STUDY)} in {folder}")
    runs = [(suite, run_dir) for suite in suites for run_dir in keep(folder / suite, FOLDER / suite)]
    for suite, run_dir in runs:
        add(FILE, rows_of(run_dir, dict(zip(KEY, (suite, *run_dir.parts[-3:]), strict=True)), METRICS))
    return len(runs)


def scores_of(suite: str) -> Scores:
    """Every outcome of the suite's kept runs; nothing if there are none."""
    return read_scores(FOLDER / suite) if any((FOLDER / suite).glob("*/*/*/done.json")) else {}


def arms() -> list[tuple[str, str, str]]:
    """The study's arms in the order of its tables: script, shape, algorithm's name in the suites."""
    return [(script, shape, f"{script}-{shape}") for script in NAMES for shape in SHAPES]


def score_table() -> str:
    """Markdown: what each shape scored, what its rollouts covered, and its losses beside those of trivial predictors.

    Means over seeds; with Student's 95 % interval for the scores.
    """
    rows = []
    for suite in STUDY:
        for task, algorithms in scores_of(suite).items():
            for script, shape, name in (arm for arm in arms() if arm[2] in algorithms):
                own, key = algorithms[name], {"suite": suite, "algorithm": name, "task": task}
                row = [task, NAMES[script], shape.replace("x", " × "), str(len(own[LAST]))]
                for outcome in (FINAL, LAST):
                    values = own.get(outcome)
                    row.append("" if values is None else cell(values.mean(), *mean_interval(values), "z.1f"))
                for each, form in FORMS.items():
                    row.append(" → ".join(f"{column(FILE, i, each, **key).mean():{form}}" for i in (2, TENTHS)))
                for pair in PAIRS:
                    losses = [column(FILE, TENTHS, each, **key) for each in pair]
                    row.append(" : ".join(f"{x.mean():.2g}" for x in losses if len(x)))
                rows.append(row)
    header = ["task", "algorithm", "N × T", "seeds", f"{FINAL}, 64 games", LAST, "distinct", "variance of s"]
    header += ["variance of z", "ℓ_P of P̄'s mean : copying", "ℓ_R : always 0"]
    return markdown(header, rows) if rows else "None yet."


def comparisons() -> list[tuple[str, str, str]]:
    """Label and two algorithms of each: the protocol's for the two scripts, then those that only describe."""
    pairs = [("128x8", "8x128"), ("32x32", "8x128")]
    label = "{}, {} − {}".format
    shapes = [(label(NAMES[each], a, b), f"{each}-{a}", f"{each}-{b}") for a, b in pairs for each in NAMES]
    scripts = [(f"Deep SPI − PPO, {shape}", f"deep_spi-{shape}", f"ppo-{shape}") for shape in SHAPES]
    return [(text.replace("x", " × "), a, b) for text, a, b in shapes + scripts]


def difference_table() -> str:
    """Markdown: differences of final policies, where there are two runs of each or more, by Welch's test.

    Once at the level of one comparison and once at that for two, as the protocol's are for two algorithms. Beside them
    the difference of the observations' variance in the second tenth, at the level of one.
    """
    rows = []
    found = [(suite, *item) for suite in STUDY for item in scores_of(suite).items()]
    for suite, task, algorithms in found:
        for label, *names in comparisons():
            a, b = (algorithms.get(name, {}).get(FINAL, ()) for name in names)
            if min(len(a), len(b)) > 1:
                intervals = [cell(*difference(a, b, level), "+z.1f") for level in (LEVEL, LEVEL / 2)]
                keys = [{"suite": suite, "algorithm": name, "task": task} for name in names]
                variance = difference(*(column(FILE, 2, "observation_variance", **key) for key in keys))
                seeds = f"{len(a)}, {len(b)}"
                rows.append([task, label, seeds, *intervals, visible_cell(a, b, "z.1f"), cell(*variance, "+.2g")])
    header = ["task", "comparison", "seeds", "difference [95 % interval]", "the same, 97.5 %", "could have seen"]
    return markdown([*header, "variance of s, second tenth"], rows) if rows else "None yet."


def runs_of(suite: str) -> list[FinishedRun]:
    """The suite's kept runs; none if there are none."""
    return read_results(FOLDER / suite).runs if any((FOLDER / suite).glob("*/*/*/done.json")) else []


def policy_table(suite: str = STUDY[1]) -> str:
    """Markdown: what every second kept policy of each run scored, the final one last, with the interval over games."""
    rows, steps = [], []
    place = [name for *_, name in arms()].index
    for run in sorted(runs_of(suite), key=lambda run: (run.task, place(run.algorithm), run.seed)):
        script, shape = run.algorithm.rsplit("-", 1)
        steps = sorted(run.policies)[1::2]  # every shape has as many steps in an update: the same for all runs
        scores = [cell(*score(run, step), "z.1f") for step in steps]
        rows.append([run.task, NAMES[script], shape.replace("x", " × "), str(run.seed), *scores])
    header = ["task", "algorithm", "N × T", "seed", *(f"{step / 1e6:.1f} M" for step in steps)]
    return markdown(header, rows) if rows else "None yet."


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmark.studies.parallelism", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="benchmark.run's results, with the suites in it")
    print(f"{collect(parser.parse_args(words).folder)} finished runs, in {FILE}")
    print(score_table(), difference_table(), policy_table(), sep="\n\n")


if __name__ == "__main__":
    main()
