"""What is missing or uneven in a suite's runs: all that keeps the report's numbers from meaning what they seem to."""

import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from benchmark.common import CIRCUMSTANCES, NO_SETTINGS, circumstance
from benchmark.report.runs import WINDOW, Key, Results

INEXACT = {  # by the end of what is recorded for a commit
    "-dirty": "files that differ from the commit (`-dirty`)",
    "-untracked": "a script that is in no commit (`-untracked`)",
}
ABSENT = "(absent)"
EARLY_SHARE = 0.5  # of the last episodes, from which it is said that they began early


def remarks_on(results: Results) -> list[str]:
    """A sentence for each."""
    checks = (
        not_evaluated,
        not_evaluated_on_the_way,
        missing_runs,
        left_out_runs,
        uneven_lengths,
        few_episodes,
        early_episodes,
        uneven_seeds,
        mixed_circumstances,
        unknown_games,
    )
    return [remark for check in checks for remark in check(results)]


def not_evaluated(results: Results) -> list[str]:
    """Final policies that played no games after training, where others did."""
    without = [run.key for run in results.runs if np.isnan(run.final)]
    if len(without) in (0, len(results.runs)):
        return []
    return [f"Scores are of training, as not every final policy was evaluated: not {results.name(without)}."]


def not_evaluated_on_the_way(results: Results) -> list[str]:
    """Runs with fewer policies of earlier steps than others, or with none."""
    most, without = defaultdict(int), [run.key for run in results.runs if len(run.policies) < 2]
    for run in results.runs:
        most[run.algorithm, run.task] = max(most[run.algorithm, run.task], len(run.policies))
    if 0 < len(without) < len(results.runs):
        return [f"Curves are of training, as not every run has policies on the way: not {results.name(without)}."]
    fewer = [run.key for run in results.runs if len(run.policies) < most[run.algorithm, run.task]]
    if without or not fewer:
        return []
    return [f"Fewer policies on the way than other seeds, so that curves are straight there: {results.name(fewer)}."]


def missing_runs(results: Results) -> list[str]:
    """Runs that should be there and are not, and those that are there and should not."""
    remarks, there = [], {run.key for run in results.runs}
    expected = set(results.plan or [])
    if results.plan is None:
        seeds = {run.seed for run in results.runs}
        expected = {(a, t, seed) for a in results.algorithms for t in results.tasks for seed in seeds}
        every = "every algorithm on every task with every seed found anywhere"
        remarks.append(f"There is no plan.json: expected is {every}.")
    if missing := expected - there:
        remarks.append(f"Missing: {len(missing)} of {len(expected)} expected runs: {results.name(missing)}.")
    if there - expected:
        remarks.append(f"Not in the plan, and averaged with the rest: {results.name(there - expected)}.")
    return remarks


def left_out_runs(results: Results) -> list[str]:
    """Folders that were not read, or not believed."""
    remarks = []
    if results.unfinished:
        remarks.append(f"Left out, as unfinished (no done.json): {results.name(results.unfinished)}.")
    for folder, reason in results.unreadable.items():
        remarks.append(f"Left out, as its files cannot be right: {folder}: {reason}.")
    if results.broken:
        remarks.append(f"Folders moved aside as broken, and left out: {results.broken}.")
    return remarks


def uneven_lengths(results: Results) -> list[str]:
    """Runs of one task that differ in steps, and runs that are not as long as their settings say."""
    remarks, other_than_meant = [], []
    for task in results.tasks:
        own = sorted((run.done["steps"], run.key) for run in results.runs if run.task == task)
        groups = grouped(results, ((f"{steps:,} steps", key) for steps, key in own))
        if len(groups) > 1:
            scoring = "each scored at its own end, curves cut at the shortest"
            remarks.append(f"Unequal lengths of {task}, {scoring}: {'; '.join(groups)}.")
    for run in results.runs:
        args, steps = run.config["args"], run.done["steps"]
        rollout = args.get("num_envs", 1) * args.get("num_steps", 1)  # a run is a whole number of these
        if abs(steps - args["total_timesteps"]) >= rollout:
            other_than_meant.append((f"{steps:,} steps, not {args['total_timesteps']:,}", run.key))
    what = "Not of the length meant, and averaged with the rest"
    return remarks + [f"{what}: {group}." for group in grouped(results, other_than_meant)]


def few_episodes(results: Results) -> list[str]:
    """Runs in which fewer than 100 episodes ended."""
    none = [run.key for run in results.runs if run.episodes == 0]
    few = {run.key: run.episodes for run in results.runs if 0 < run.episodes < WINDOW}
    no_score = "" if results.by_final_policy else ", so there is no score"
    remarks = [f"No episode ended in training{no_score}: {results.name(none)}."] if none else []
    if few:
        what = f"Fewer than {WINDOW} episodes (at least {min(few.values())}), so that best and last ones are of fewer"
        remarks.append(f"{what}: {results.name(few)}.")
    return remarks


def early_episodes(results: Results) -> list[str]:
    """Runs too short for their many environments: their scores say little about the policy of the end."""
    if results.by_final_policy:
        return []
    early = {run.key: run.began_early for run in results.runs if run.began_early > EARLY_SHARE}
    if not early:
        return []
    what = f"Up to {max(early.values()):.0%} of the last {WINDOW} episodes began in the first half of the run"
    return [f"{what}; what the final policy can do, evaluate.py shows: {results.name(early)}."]


def uneven_seeds(results: Results) -> list[str]:
    """Which seeds there are, if algorithms and tasks do not all have the same; and where there is only one."""
    seeds = defaultdict(set)
    for algorithm, task, seed in (run.key for run in results.runs):
        seeds[algorithm, task].add(seed)
    remarks = []
    if any(own != seeds[results.runs[0].key[:2]] for own in seeds.values()):
        remarks.append(f"Seeds are not the same everywhere: {results.name(run.key for run in results.runs)}.")
    if single := [run.key for run in results.runs if len(seeds[run.key[:2]]) == 1]:
        why = "resampling one run can only return that run"
        remarks.append(f"Only one seed, so no interval, as {why}: {results.name(single)}.")
    return remarks


def mixed_circumstances(results: Results) -> list[str]:
    """Circumstances that differ anywhere, code that no commit names, settings that differ within an algorithm.

    Settings that the plan names may differ, but not between seeds. A package that no run of a script uses has no
    version there.
    """
    circumstances, inexact, unlike, settings = {}, [], [], defaultdict(dict)
    packages = defaultdict(set)
    for run in results.runs:
        packages[run.config["script"]] |= set(run.config["versions"])
    for run in results.runs:
        used = packages[run.config["script"]]
        versions = {f"version of {name}": run.config["versions"].get(name, ABSENT) for name in sorted(used)}
        own = {name: circumstance(run.config, name) for name in CIRCUMSTANCES} | versions
        circumstances[run.key] = own
        commit = run.config["git_commit"]
        if not re.fullmatch("[0-9a-f]{40}", commit or ""):
            ending = next((text for ending, text in INEXACT.items() if (commit or "").endswith(ending)), "")
            inexact.append((ending or f"`{commit}` is no commit" if commit else "no commit recorded", run.key))
        has = run.config["args"] | own  # device and precision are in one of the two
        for name, value in planned(results, run.key).items():
            if not same(value, has.get(name)):
                unlike.append((f"{name} is `{has.get(name, ABSENT)}`, not `{value}`", run.key))
        own_names = (*NO_SETTINGS, "total_timesteps")  # whose unevenness has remarks of its own
        args = {name: value for name, value in run.config["args"].items() if name not in own_names}
        settings[run.algorithm][run.key] = {"script": run.config["script"]} | args
    remarks = mixed(results, circumstances)
    remarks += [f"Code not exactly known, {group}." for group in grouped(results, inexact)]
    remarks += [f"Not as planned, {group}." for group in grouped(results, unlike)]
    for algorithm, own in settings.items():
        names = {name for values in own.values() for name in values}
        whole = {key: {name: values.get(name, ABSENT) for name in names} for key, values in own.items()}
        remarks += [f"{algorithm}: {remark}" for remark in mixed(results, whole)]
    return remarks


def planned(results: Results, key: Key) -> dict:
    """The settings that the plan names for a run."""
    return (results.plan or {}).get(key, {})


def same(planned: object, had: object) -> bool:
    """Whether a run has what was planned; on a command line a number is text."""
    try:
        return float(planned) == float(had)
    except (TypeError, ValueError):
        return str(planned) == str(had)


def mixed(results: Results, values: dict[Key, dict]) -> list[str]:
    """Every named value that is not the same in all runs that have it, but for what the plan means to differ."""
    remarks = []
    for name in sorted({name for own in values.values() for name in own}):
        texts = {key: f"`{shortened(name, own[name])}`" for key, own in values.items() if name in own}
        groups = grouped(results, ((text, key) for key, text in texts.items()))
        cells = {(*key[:2], text) for key, text in texts.items()}
        alike_seeds = len(cells) == len({cell[:2] for cell in cells})
        unplanned = {text for key, text in texts.items() if name not in planned(results, key)}
        if len(groups) > 1 and not (alike_seeds and len(unplanned) <= 1):
            pairs = {(key[1], text) for key, text in texts.items()}
            by_task = len(pairs) == len({task for task, _ in pairs})  # no task has two values: a suite may mean it
            remarks.append(f"{'Not the same on every task:' if by_task else 'Mixed'} {name}: {'; '.join(groups)}.")
    return remarks


def shortened(name: str, value: object) -> object:
    """A commit by its first ten digits and its ending; all else as it is."""
    return value[:10] + value[40:] if name == "git_commit" and value else value


def grouped(results: Results, pairs: Iterable[tuple[str, Key]]) -> list[str]:
    """Per text, the runs that have it: `1,280 steps: ppo (seed 1 of Pong)`."""
    groups = defaultdict(list)
    for text, key in pairs:
        groups[text].append(key)
    return [f"{text}: {results.name(keys)}" for text, keys in groups.items()]


def unknown_games(results: Results) -> list[str]:
    """Tasks that cannot be normalised."""
    unknown = [task for task in results.tasks if task not in results.scored_tasks]
    what = "No score of a random player and of a human, or of who solves it, known: raw returns only, in no aggregate"
    return [f"{what}: {', '.join(unknown)}."] if unknown else []
