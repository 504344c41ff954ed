"""A suite's report: python -m benchmark.report DIR [--baseline ppo] [--out DIR/report]

DIR is a suite's folder as benchmark.run fills it: ALGORITHM/TASK/SEED/ with config.json, episodes.csv and, once the run
is finished, done.json; plan.json, if it is there, lists the runs to expect. Written: report.md, the same as one
self-contained report.html, CSV tables, and pictures as PNG and, for print, as PDF. Needs requirements-benchmark.txt.

Nothing uneven is averaged silently: what is missing, left out, or not the same everywhere stands in the first section.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np

from benchmark.common import circumstances, settings_text
from benchmark.report import aggregation
from benchmark.report.aggregation import METRICS, Rectangle, as_record, curve_records, number, with_interval
from benchmark.report.document import Block, Bullets, Heading, Picture, Table, Text, write_csv, write_documents
from benchmark.report.pictures import draw_bars, draw_curves
from benchmark.report.runs import WINDOW, FinishedRun, Results, curve_of, curve_points, read_known_scores, read_results
from benchmark.report.uneven import remarks_on

PROFILE_POINTS = 81
CURVES = "Learning curves"
NO_CURVE = (
    "Not drawn: among more environments the games that have ended by a step are the shorter ones, and began with older "
    "policies, so that such curves compare with nobody's. Environments: "
)
SCORES = {
    True: "A run's score is the mean return of its final policy in the games that it played after training, actions "
    "sampled.",
    False: f"A run's score is the mean return of its last {WINDOW} episodes in training.",
}
RESAMPLES = 2000  # of every bootstrap: a bound's own standard error is then 1.5 % of the interval's width

# ---- The sections: each writes its CSV tables and pictures, and returns its blocks


def opening(results: Results, suite: Path, resamples: int) -> list[Block]:
    """What this is, and how to read it."""
    hours = sum(run.done["minutes"] for run in results.runs) / 60
    counts = f"Algorithms: {len(results.algorithms)}. Tasks: {len(results.tasks)}."
    return [
        Heading(f"Report on {suite.name}", level=1),
        Text(f"Finished runs: {len(results.runs)}, of {hours:,.1f} hours together. {counts}"),
        Text(
            f"{SCORES[results.by_final_policy]} Its best window is the largest mean of "
            f"{WINDOW} consecutive episodes, its best episode the largest return; both pick a lucky moment, and are no "
            "estimate of the final policy. Tables show the mean over seeds. In brackets: 95 % intervals. A task's mean "
            f"has Student's; what goes over tasks has rliable's percentile bootstrap, {resamples:,} resamples of the "
            "seeds within each task, which is too narrow with few seeds: over many tasks by √((n-1)/n), a fifth at "
            "three, and over a single task, at three seeds, by two thirds of Student's width."
        ),
    ]


def unevenness(results: Results, rectangles: list[Rectangle]) -> list[Block]:
    """All that keeps the numbers below from meaning what they seem to."""
    remarks = remarks_on(results) + [remark for rectangle in rectangles for remark in rectangle.remarks]
    nothing = "Nothing: every expected run is finished, and all are alike in seeds, length, settings, code and machine."
    return [Heading("What is missing or uneven"), Bullets(remarks or [nothing])]


def provenance(results: Results, out: Path) -> list[Block]:
    """What the runs were computed with, per algorithm; runs.csv has every run's scores and settings."""
    names = ("script", "precision", "device", "machine", "torch_threads", "git_commit", "versions")
    records = [run_record(run) for run in results.runs]
    rows = []
    for algorithm in results.algorithms:
        own = [record for record in records if record["algorithm"] == algorithm]
        cells = ["; ".join(sorted({str(record[name]) for record in own})) for name in names]
        sps = np.median([record["sps"] for record in own])
        rows.append([algorithm, str(len(own)), *cells[:-1], cells[-1].replace("=", " "), f"{sps:,.0f}"])
    write_csv(out / "runs.csv", records)
    return [
        Heading("What was run"),
        Table(["algorithm", "runs", *names, "sps"], rows),
        Text("sps: median over runs. `runs.csv` has every run: scores, settings, machine, versions."),
    ]


def run_record(run: FinishedRun) -> dict:
    """A run as a line of runs.csv."""
    args = run.config["args"]
    key = {"algorithm": run.algorithm, "task": run.task, "seed": run.seed, "env_id": args["env_id"]}
    scores = {
        "final_policy": run.final,
        "last_100": run.last,
        "best_window": run.best_window,
        "best_episode": run.best_episode,
    }
    cost = {"episodes": run.episodes} | {name: run.done[name] for name in ("steps", "minutes", "sps")}
    config = {"script": run.config["script"]} | circumstances(run.config)
    return key | scores | cost | config | {"settings": settings_text(args)}


def aggregates(results: Results, rectangle: Rectangle, out: Path, resamples: int) -> list[Block]:
    """IQM, median, mean and optimality gap of the human-normalised scores, and the performance profile."""
    heading = Heading("Aggregates over games")
    if not rectangle.seeds:
        reason = "no game with known random and human scores has a run of every algorithm"
        why = "Returns of different tasks have different scales, so a mean of them would mean nothing."
        return [heading, Text(f"None: {reason}. {why}")]
    scores = aggregation.matrices(results.runs, rectangle, lambda run: run.normalised(results.score(run)))
    estimates = aggregation.estimate(scores, aggregation.four_aggregates, resamples)
    records, rows = [], []
    for name, estimated in estimates.items():
        seeds, games = scores[name].shape
        key = {"algorithm": name, "seeds": seeds, "games": games}
        records += [key | {"metric": metric} | as_record(estimated, i) for i, metric in enumerate(METRICS)]
        cells = [with_interval(estimated, i) for i in range(len(METRICS))]
        rows.append([name, str(seeds), str(games), *cells])
    write_csv(out / "aggregates.csv", records)
    thresholds = np.linspace(0, max(1.0, *(np.percentile(matrix, 95) for matrix in scores.values())), PROFILE_POINTS)
    profiles = aggregation.estimate(scores, lambda matrix: aggregation.share_above(matrix, thresholds), resamples)
    write_csv(out / "performance_profiles.csv", curve_records(thresholds, profiles, "threshold"))
    titles = [f"{name} ({'lower' if name == 'optimality gap' else 'higher'} is better)" for name in METRICS]
    bars = draw_bars(estimates, titles, "human-normalised score", out / "aggregates.png")
    labels = "human-normalised score τ", "share of runs with a score above τ"
    curves = draw_curves({"": (thresholds, profiles)}, labels, out / "performance_profiles.png")
    return [
        heading,
        Text("Human-normalised: a random player has 0, the human 1. Intervals: rliable's stratified bootstrap."),
        Table(["algorithm", "seeds", "games", *(f"{name} [95 %]" for name in METRICS)], rows),
        Picture(bars, "Aggregates, with 95 % intervals"),
        Picture(curves, "Performance profiles"),
    ]


def improvements(results: Results, rectangle: Rectangle, baseline: str, out: Path, resamples: int) -> list[Block]:
    """How probably a run of each algorithm beats one of the baseline on the same task, averaged over tasks."""
    title = f"Probability of improvement over {baseline}"
    scores = aggregation.matrices(results.runs, rectangle, results.score)
    to_beat = scores.pop(baseline, None)
    if to_beat is None or not scores:
        needed = f"runs of `{baseline}` and of another algorithm on the same tasks"
        return [Heading(title), Text(f"None: it takes {needed}.")]
    pairs = {name: [matrix, to_beat] for name, matrix in scores.items()}
    estimates = aggregation.estimate(pairs, aggregation.improvement, resamples)
    keys = {name: {"algorithm": name, "baseline": baseline, "tasks": len(rectangle.tasks)} for name in estimates}
    records = [keys[name] | as_record(each, 0) for name, each in estimates.items()]
    write_csv(out / "probability_of_improvement.csv", records)
    rows = [[*map(str, keys[name].values()), with_interval(each, 0)] for name, each in estimates.items()]
    picture = draw_bars(estimates, [title], "probability", out / "probability_of_improvement.png", neutral=0.5)
    meaning = "It only asks which of two returns on the same task is larger, so it needs no human score. Half: neither."
    header = ["algorithm", "over", "tasks", "probability [95 %]"]
    return [Heading(title), Text(meaning), Table(header, rows), Picture(picture, "Probability of improvement")]


def efficiency(results: Results, rectangle: Rectangle, out: Path, resamples: int) -> list[Block]:
    """IQM over steps."""
    if not rectangle.seeds:
        return []
    steps = curve_points([run for run in results.runs if run.task in results.scored_tasks])

    def curve(run: FinishedRun) -> np.ndarray:
        return run.normalised(curve_of(run.ends, run.returns, steps))

    scores = aggregation.matrices(results.runs, rectangle, curve)  # (seeds, games, points)
    if unlike := results.unlike_envs(rectangle.tasks):
        return [Heading("Sample efficiency"), Text(NO_CURVE + unlike + ".")]
    end = f"the shortest run's end, {steps[-1]:,.0f} steps"
    begun = ~np.any([np.isnan(matrix).any(axis=(0, 1)) for matrix in scores.values()], axis=0)
    if not begun.any():
        return [Heading("Sample efficiency"), Text(f"None: some run has no episode by {end}.")]
    steps, scores = steps[begun], {name: matrix[..., begun] for name, matrix in scores.items()}
    estimates = aggregation.estimate(scores, aggregation.interquartile_mean, resamples)
    write_csv(out / "sample_efficiency.csv", curve_records(steps, estimates, "step"))
    labels = "environment steps", "IQM of human-normalised score"
    picture = draw_curves({"": (steps, estimates)}, labels, out / "sample_efficiency.png")
    meaning = (
        f"IQM of the mean return of the last {WINDOW} episodes that had ended by a step, from where every run has one, "
        f"up to {end}. Intervals hold for each step by itself."
    )
    return [Heading("Sample efficiency"), Text(meaning), Picture(picture, "IQM over steps")]


def task_table(results: Results, out: Path) -> list[Block]:
    """Every task's scores by algorithm, beside the published figure."""
    records, rows = [], []
    for task, algorithm in product(results.tasks, results.algorithms):
        runs = [run for run in results.runs if (run.algorithm, run.task) == (algorithm, task) and run.episodes]
        if not runs:
            continue
        score = aggregation.mean_over_seeds(np.array([[results.score(run)] for run in runs]))
        last, window, episode = np.mean([[run.last, run.best_window, run.best_episode] for run in runs], axis=0)
        steps = [run.done["steps"] for run in runs]
        span = f"{max(steps):,}" if len(set(steps)) == 1 else f"UNEQUAL: {min(steps):,} to {max(steps):,}"
        scaled, published, known_cells = np.nan, np.nan, ["", ""]
        if task in results.scored_tasks:
            scaled = runs[0].normalised(score.point[0])
            published = read_known_scores()[runs[0].game]["published_ppo"]
            known_cells = [number(scaled), number(published) if published else "0.0 (no score)"]
        key = {"task": task, "algorithm": algorithm, "seeds": len(runs), "shortest": min(steps), "longest": max(steps)}
        best = {"last_100": last, "best_window": window, "best_episode": episode}
        known = {"human_normalised": scaled, "published_ppo": published}
        records.append(key | as_record(score, 0, "score") | best | known)
        cells = [with_interval(score, 0), number(window), number(episode), *known_cells]
        rows.append([task, algorithm, str(len(runs)), span, *cells])
    write_csv(out / "tasks.csv", records)
    scores = [f"{results.score_name} [95 %]", "best window", "best episode", "human-normalised", "published PPO"]
    return [
        Heading("Every task"),
        Text(
            "Human-normalised: the mean over seeds of the score, with random player 0 and human 1. Published "
            "PPO: not ours, but the Deep SPI authors' own (stochastic setting, 10 M steps, 3 seeds), the best value "
            "seen in training: compare it with the best window. It started from returns of 0, so games of negative "
            "returns read 0.0 there, which is no score. Sources: `benchmark/report/atari57_scores.csv`."
        ),
        Table(["task", "algorithm", "seeds", "steps", *scores], rows),
    ]


def learning_curves(results: Results, out: Path) -> list[Block]:
    """Mean return over steps, for every task, as CSV and as a picture."""
    panels, remarks, records = {}, {}, []
    for task in results.tasks:
        runs = [run for run in results.runs if run.task == task]
        steps, estimates = curve_points(runs), {}
        for algorithm in dict.fromkeys(run.algorithm for run in runs if run.episodes):
            own = [run for run in runs if run.algorithm == algorithm and run.episodes]
            curves = np.array([curve_of(run.ends, run.returns, steps) for run in own])
            estimates[algorithm] = aggregation.mean_over_seeds(curves)
        records += [{"task": task} | record for record in curve_records(steps, estimates, "step")]
        if estimates and (unlike := results.unlike_envs([task])):
            remarks[task] = unlike
        elif estimates:
            panels[task] = steps, estimates
    write_csv(out / "learning_curves.csv", records)
    texts = [Text(f"{task}. {NO_CURVE}{unlike}.") for task, unlike in remarks.items()]
    if not panels:
        return [Heading(CURVES), *texts] if texts else []
    picture = draw_curves(panels, ("environment steps", "return"), out / "learning_curves.png")
    caption = "Mean over seeds, shaded its 95 % interval; a curve begins where every seed has an episode"
    return [Heading(CURVES), *texts, Picture(picture, caption)]


# ---- The report


def write_report(suite: Path, out: Path, baseline: str | None = None, resamples: int = RESAMPLES) -> None:
    """Everything, into the folder `out`, with `ppo` for a baseline if none is named.

    Raises ValueError if there is no finished run, no run of the baseline named, or no way to read plan.json.
    """
    results = read_results(suite)
    if not results.runs:
        unfinished, unreadable = len(results.unfinished), len(results.unreadable)
        found = f"{unfinished} unfinished, {unreadable} unreadable, {results.broken} broken"
        raise ValueError(f"{suite}: no finished run ({found})")
    if baseline not in (None, *results.algorithms):
        raise ValueError(f"--baseline: no run of {baseline!r}; there are {', '.join(results.algorithms)}")
    out.mkdir(parents=True, exist_ok=True)
    runs = results.runs
    games = aggregation.choose_rectangle(runs, results.scored_tasks, "Aggregates over games")
    tasks = aggregation.choose_rectangle(runs, results.tasks, "Probability of improvement")
    blocks = [
        *opening(results, suite, resamples),
        *unevenness(results, [games, tasks]),
        *provenance(results, out),
        *aggregates(results, games, out, resamples),
        *improvements(results, tasks, baseline or "ppo", out, resamples),
        *efficiency(results, games, out, resamples),
        *task_table(results, out),
        *learning_curves(results, out),
    ]
    write_documents(blocks, out)


def main() -> None:
    """The command line. Exits with 2 if there is nothing to report on."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.report", description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, metavar="DIR", help="a suite's results: DIR/ALGORITHM/TASK/SEED/")
    parser.add_argument("--baseline", help="algorithm to improve on (default: ppo, if there is one)")
    parser.add_argument("--out", type=Path, help="where to write (default: DIR/report)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.suite / "report"
    try:
        write_report(arguments.suite, out, arguments.baseline)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"report: {out / 'report.md'}, {out / 'report.html'}")
