"""A suite's report: python -m benchmark.report DIR [--baseline ppo] [--out DIR/report]

DIR is a suite's folder as benchmark.run fills it: ALGORITHM/TASK/SEED/ with config.json, episodes.csv and, once the run
is finished, done.json; plan.json, if it is there, lists the runs to expect. Written: report.md, the same as one
self-contained report.html, tables as CSV and LaTeX, pictures as PNG and, for print, as PDF. Needs
requirements-benchmark.txt.

Nothing uneven is averaged silently: what is missing, left out, or not the same everywhere stands in the first section.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np

from benchmark.common import circumstances, settings_text
from benchmark.report import aggregation, scores
from benchmark.report.aggregation import METRICS, Rectangle, as_record, curve_records, number, with_interval
from benchmark.report.document import Block, Bullets, Heading, Picture, Table, Text, write_csv, write_documents
from benchmark.report.pictures import called, colours, draw_bars, draw_curves
from benchmark.report.runs import WINDOW, FinishedRun, Results, curve_points, read_known_scores, read_results
from benchmark.report.uneven import remarks_on

PROFILE_POINTS = 81
LEAST_POINTS = 5  # of a curve: two points draw a climb out of noise
CURVES = "Learning curves"
NO_CURVE = (
    "Not drawn: among more environments the games that have ended by a step are the shorter ones, and began with older "
    "policies. Curves of training games compare only where all have as many environments. They have: "
)
CURVE_OF = {
    True: "the policies that were kept on the way, in games played after training, with straight lines between them",
    False: f"the last {WINDOW} games in training that had ended (at first the short ones: a curve's start says little)",
}
SCORES = {
    True: "A run's score is the mean return of its final policy in the games that it played after training, actions "
    "sampled.",
    False: f"A run's score is the mean return of its last {WINDOW} episodes in training.",
}
SCALES = {
    "human-normalised": "Human-normalised: a random player has 0, the human 1.",
    "normalised": "Normalised: a random player has 0, who just solves the task 1 (on Atari: the human). Sources: "
    "`RANDOM_PLAYER` and `SOLVED_AT` in `benchmark/suites.py`, `benchmark/report/atari57_scores.csv`.",
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
            "three; but the probability of improvement has Wilson's."
        ),
    ]


def unevenness(results: Results, rectangles: list[Rectangle]) -> list[Block]:
    """All that keeps the numbers below from meaning what they seem to."""
    remarks = remarks_on(results) + [remark for rectangle in rectangles for remark in rectangle.remarks]
    nothing = "Nothing: every expected run is finished, and all are alike in seeds, length, settings, code and machine."
    return [Heading("What is missing or uneven"), Bullets(remarks or [nothing])]


def provenance(results: Results, out: Path) -> list[Block]:
    """What the runs were computed with, per algorithm; runs.csv has every run's scores and settings."""
    names = ("script", "precision", "device", "torch_threads")
    records = [run_record(run) for run in results.runs]
    of = {name: [record for record in records if record["algorithm"] == name] for name in results.algorithms}
    rows = []
    for algorithm, own in of.items():
        cells = ["; ".join(sorted({str(record[name]) for record in own})) for name in names]
        sps = np.median([record["sps"] for record in own])
        rows.append([algorithm, str(len(own)), *cells, f"{sps:,.0f}"])
    write_csv(out / "runs.csv", records)
    lines = []
    for name in ("machine", "git_commit", "versions"):
        for value in dict.fromkeys(record[name] for record in records):
            having = [algorithm for algorithm, own in of.items() if any(record[name] == value for record in own)]
            whose = "" if len(having) == len(of) else f" ({', '.join(map(called, having))})"
            lines.append(f"{name}: {str(value).replace('=', ' ')}{whose}")
    return [
        Heading("What was run"),
        Table(["algorithm", "runs", *names, "sps"], rows, "runs"),
        Text("sps: median over the runs of all tasks. `runs.csv` has every run: scores, settings, machine, versions."),
        Bullets(lines),
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
    """IQM, median, mean and optimality gap of the normalised scores, and the performance profile."""
    heading = Heading("Aggregates over tasks")
    if not rectangle.seeds:
        reason = (
            "no task with a known score of a random player and of a human, or of who solves it, has a run of every "
        )
        reason += "algorithm"
        why = "Returns of different tasks have different scales, so a mean of them would mean nothing."
        return [heading, Text(f"None: {reason}. {why}")]
    if len(rectangle.tasks) == 1:
        return [heading, Text(f"None: there is one task, {rectangle.tasks[0]}. Its scores are below.")]
    scores = aggregation.matrices(results.runs, rectangle, lambda run: run.normalised(results.score(run)))
    estimates = aggregation.estimate(scores, aggregation.four_aggregates, resamples)
    records, rows = [], []
    for name, estimated in estimates.items():
        seeds, tasks = scores[name].shape
        key = {"algorithm": name, "seeds": seeds, "tasks": tasks}
        records += [key | {"metric": metric} | as_record(estimated, i) for i, metric in enumerate(METRICS)]
        cells = [with_interval(estimated, i) for i in range(len(METRICS))]
        rows.append([name, str(seeds), str(tasks), *cells])
    write_csv(out / "aggregates.csv", records)
    thresholds = np.linspace(0, max(1.0, *(np.percentile(matrix, 95) for matrix in scores.values())), PROFILE_POINTS)
    profiles = aggregation.estimate(scores, lambda matrix: aggregation.share_above(matrix, thresholds), resamples)
    profiles = {name: (thresholds, profile) for name, profile in profiles.items()}
    write_csv(out / "performance_profiles.csv", curve_records(profiles, "threshold"))
    titles = [f"{name} ({'lower' if name == 'optimality gap' else 'higher'} is better)" for name in METRICS]
    look, label = colours(results.algorithms), f"{results.scale_name} score"
    bars = draw_bars(estimates, look, titles, label, out / "aggregates.png")
    labels = f"{label} τ", "share of runs with a score above τ"
    curves = draw_curves({"": profiles}, look, labels, out / "performance_profiles.png", stairs=True)
    return [
        heading,
        Text(f"{SCALES[results.scale_name]} Intervals: rliable's stratified bootstrap."),
        Table(["algorithm", "seeds", "tasks", *(f"{name} [95 %]" for name in METRICS)], rows, "aggregates"),
        Picture(bars, f"Aggregates over {tasks} tasks; 95 % stratified bootstrap; axes need not begin at 0"),
        Picture(curves, f"Performance profiles; shaded: 95 % stratified bootstrap, {tasks} tasks"),
    ]


def improvements(results: Results, rectangle: Rectangle, baseline: str, out: Path) -> list[Block]:
    """How probably a run of each algorithm beats one of the baseline on the same task, averaged over tasks."""
    title = f"Probability of improvement over {called(baseline)}"
    scores = aggregation.matrices(results.runs, rectangle, results.score)
    to_beat = scores.pop(baseline, None)
    if to_beat is None or not scores:
        needed = f"runs of `{baseline}` and of another algorithm on the same tasks"
        return [Heading(title), Text(f"None: it takes {needed}.")]
    estimates = {name: aggregation.improvement_estimate(matrix, to_beat) for name, matrix in scores.items()}
    keys = {name: {"algorithm": name, "baseline": baseline, "tasks": len(rectangle.tasks)} for name in estimates}
    records = [keys[name] | as_record(each, 0) for name, each in estimates.items()]
    write_csv(out / "probability_of_improvement.csv", records)
    rows = [[*map(str, keys[name].values()), with_interval(each, 0)] for name, each in estimates.items()]
    look, path = colours(results.algorithms), out / "probability_of_improvement.png"
    picture = draw_bars(estimates, look, [title], "probability", path, neutral=0.5)
    meaning = (
        "It only asks which of two returns on the same task is larger, so it needs no scale. Half: neither. Intervals: "
        "Wilson's for a share of n trials, n being tasks times seeds, of the side that has fewer. Whatever the returns "
        "are like, this probability varies no more than such a share (Birnbaum and Klose, 1957)."
    )
    header = ["algorithm", "over", "tasks", "probability [95 %]"]
    table = Table(header, rows, "probability_of_improvement")
    return [Heading(title), Text(meaning), table, Picture(picture, "Probability of improvement, 95 % (Wilson)")]


def efficiency(results: Results, rectangle: Rectangle, out: Path, resamples: int) -> list[Block]:
    """IQM over steps; over shares of a run where tasks differ in length."""
    heading = Heading("Sample efficiency")
    if not rectangle.seeds or len(rectangle.tasks) == 1:  # of one task its learning curves say it
        return []
    if not results.by_policies and (unlike := results.unlike_envs(rectangle.tasks)):
        return [heading, Text(NO_CURVE + unlike + ".")]
    ends = {task: min(run.done["steps"] for run in results.runs if run.task == task) for task in rectangle.tasks}
    alike = len(set(ends.values())) == 1
    x = curve_points(ends[rectangle.tasks[0]] if alike else 1.0, results.by_policies)

    def curve(run: FinishedRun) -> np.ndarray:
        return run.normalised(run.curve(x if alike else x * ends[run.task], results.by_policies))

    scores = aggregation.matrices(results.runs, rectangle, curve)  # (seeds, tasks, points)
    begun = ~np.any([np.isnan(matrix).any(axis=(0, 1)) for matrix in scores.values()], axis=0)
    if begun.sum() < LEAST_POINTS:
        late = "None: in some run hardly an episode has ended by the end of its task's shortest run"
        return [heading, Text(f"{late} (points that all have: {begun.sum()}).")]
    x, scores = x[begun], {name: matrix[..., begun] for name, matrix in scores.items()}
    estimates = aggregation.estimate(scores, aggregation.interquartile_mean, resamples)
    curves = {name: (x, estimated) for name, estimated in estimates.items()}
    write_csv(out / "sample_efficiency.csv", curve_records(curves, "step" if alike else "share"))
    axis = "environment steps" if alike else "share of the task's steps"
    labels = axis, f"IQM of {results.scale_name} score"
    picture = draw_curves({"": curves}, colours(results.algorithms), labels, out / "sample_efficiency.png")
    meaning = (
        f"IQM of the mean return of {CURVE_OF[results.by_policies]}, from where every run has one, up to the end of "
        "each task's shortest run. Intervals hold for each point by itself."
    )
    return [heading, Text(meaning), Picture(picture, f"IQM over {axis}")]


def task_table(results: Results, out: Path) -> list[Block]:
    """Every task's scores by algorithm, beside the published figure where there is one."""
    records, rows, scale = [], [], results.scale_name
    games = [run.game for run in results.runs if run.game in read_known_scores()]
    for task, algorithm in product(results.tasks, results.algorithms):
        runs = [run for run in results.runs if (run.algorithm, run.task) == (algorithm, task)]
        runs = [run for run in runs if not np.isnan(results.score(run))]
        if not runs:
            continue
        score = aggregation.mean_over_seeds(np.array([[results.score(run)] for run in runs]))
        last, window, episode = np.mean([[run.last, run.best_window, run.best_episode] for run in runs], axis=0)
        steps = [run.done["steps"] for run in runs]
        span = f"{max(steps):,}" if len(set(steps)) == 1 else f"UNEQUAL: {min(steps):,} to {max(steps):,}"
        key = {"task": task, "algorithm": algorithm, "seeds": len(runs), "shortest": min(steps), "longest": max(steps)}
        best = {"last_100": last, "best_window": window, "best_episode": episode}
        cells, known = [with_interval(score, 0), *("" if np.isnan(x) else number(x) for x in (window, episode))], {}
        if results.scored_tasks:
            known[scale.replace("-", "_")] = runs[0].normalised(score.point[0]) if runs[0].scale else np.nan
            cells.append(number(known[scale.replace("-", "_")]) if runs[0].scale else "")
        if games:
            published = read_known_scores().get(runs[0].game, {}).get("published_ppo", np.nan)
            known["published_ppo"] = published
            cells.append("" if np.isnan(published) else number(published) if published else "0.0 (no score)")
        records.append(key | as_record(score, 0, "score") | best | known)
        rows.append([task, algorithm, str(len(runs)), span, *cells])
    write_csv(out / "tasks.csv", records)
    header = ["task", "algorithm", "seeds", "steps", f"{results.score_name} [95 %]", "best window", "best episode"]
    texts = []
    if results.scored_tasks:
        header.append(scale)
        texts.append(SCALES[scale])
    if games:
        header.append("published PPO (10 M, best)")
        texts.append(
            "Published PPO: not ours, but the Deep SPI authors' own (stochastic setting, 10 M steps, 3 seeds), the "
            "best value seen in training: compare it with the best window. It started from returns of 0, so games of "
            "negative returns read 0.0 there, which is no score. Sources: `benchmark/report/atari57_scores.csv`."
        )
    printed = (0, 1, 2, 4, *((7,) if results.scored_tasks else ()))
    return [Heading("Every task"), *([Text(" ".join(texts))] if texts else []), Table(header, rows, "tasks", printed)]


def differences(results: Results, baseline: str, out: Path) -> list[Block]:
    """Per task, how far each algorithm's mean is from the baseline's, with Welch's interval and test."""
    records, rows = [], []
    for task, algorithm in product(results.tasks, results.algorithms):
        own, theirs = (
            np.array([results.score(run) for run in results.runs if (run.algorithm, run.task) == (name, task)])
            for name in (algorithm, baseline)
        )
        own, theirs = own[~np.isnan(own)], theirs[~np.isnan(theirs)]
        if algorithm == baseline or not len(own) or not len(theirs):
            continue
        mean, low, high = scores.difference(own, theirs)
        p = scores.welch(own, theirs).pvalue if low < high else np.nan
        visible = scores.visible_effect(own, theirs)
        key = {"task": task, "algorithm": algorithm, "baseline": baseline, "seeds": f"{len(own)}, {len(theirs)}"}
        records.append(key | {"difference": mean, "low": low, "high": high, "p": p, "could_have_seen": visible})
        cells = [scores.cell(mean, low, high, "+z,.4g"), *("" if np.isnan(x) else f"{x:.3g}" for x in (p, visible))]
        rows.append([task, algorithm, key["seeds"], *cells])
    if not rows:
        return []
    write_csv(out / "differences.csv", records)
    meaning = (
        "Difference of the means of the scores, with Welch's 95 % interval and test, not corrected for their number. "
        "Could have seen: the difference that such runs would find in four of five repetitions, if their spread were "
        "the true one."
    )
    header = ["task", "algorithm", "seeds", f"less {called(baseline)} [95 %]", "p", "could have seen"]
    return [Heading(f"Differences from {called(baseline)}"), Text(meaning), Table(header, rows, "differences")]


def learning_curves(results: Results, out: Path) -> list[Block]:
    """Mean return of every task, over steps and over the time that they took, as CSV and as pictures."""
    of_policies, panels, times = results.by_policies, {}, {}  # task → its curves
    for task, algorithm in product(results.tasks, results.algorithms):
        own = [run for run in results.runs if (run.algorithm, run.task) == (algorithm, task)]
        own = [run for run in own if of_policies or run.episodes]
        if own:
            shortest = min(run.done["steps"] for run in results.runs if run.task == task)
            steps = curve_points(shortest, of_policies)
            estimated = aggregation.mean_over_seeds(np.array([run.curve(steps, of_policies) for run in own]))
            panels.setdefault(task, {})[algorithm] = steps, estimated
            minutes = steps * np.median([run.done["minutes"] / run.done["steps"] for run in own])
            times.setdefault(task, {})[algorithm] = minutes, estimated
    if not panels:
        return []
    longest = max(minutes[-1] for own in times.values() for minutes, _ in own.values())
    unit, of_a_minute = ("seconds", 60) if longest < 2 else ("minutes", 1) if longest < 120 else ("hours", 1 / 60)
    times = {task: {name: (x * of_a_minute, y) for name, (x, y) in own.items()} for task, own in times.items()}
    for axis, curves, name in (("step", panels, "learning_curves"), (unit, times, "learning_curves_time")):
        records = [{"task": task} | record for task, own in curves.items() for record in curve_records(own, axis)]
        write_csv(out / f"{name}.csv", records)
    blocks = [Heading(CURVES)]
    for task in list(panels):
        if not of_policies and (unlike := results.unlike_envs([task])):
            drawn = results.most_envs(task)
            left_out = ", ".join(called(name) for name in panels[task] if name not in drawn)
            blocks.append(Text(f"{task}, {left_out}. {NO_CURVE}{unlike}."))
            for curves in (panels, times):
                curves[task] = {name: curve for name, curve in curves[task].items() if name in drawn}
    panels, times = ({task: own for task, own in curves.items() if len(own) > 1} for curves in (panels, times))
    if not panels:
        return blocks
    look = colours(results.algorithms)
    over_steps = draw_curves(panels, look, ("environment steps", "return"), out / "learning_curves.png")
    over_time = draw_curves(times, look, (f"{unit} of training", "return"), out / "learning_curves_time.png")
    caption = (
        f"Mean return of {CURVE_OF[of_policies]}, from where every seed has one; shaded its 95 % interval over seeds, "
        "cut where it is much wider than the curves"
    )
    same = (
        f"The same over {unit} of training, on the machines and with the threads named above: steps times the median "
        "over seeds of a run's time for a step, evaluation not included"
    )
    return [*blocks, Picture(over_steps, caption), Picture(over_time, same)]


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
    scored = aggregation.choose_rectangle(results, results.scored_tasks, "Aggregates over tasks")
    tasks = aggregation.choose_rectangle(results, results.tasks, "Probability of improvement")
    blocks = [
        *opening(results, suite, resamples),
        *unevenness(results, [scored, tasks]),
        *provenance(results, out),
        *aggregates(results, scored, out, resamples),
        *improvements(results, tasks, baseline or "ppo", out),
        *efficiency(results, scored, out, resamples),
        *task_table(results, out),
        *differences(results, baseline or "ppo", out),
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
