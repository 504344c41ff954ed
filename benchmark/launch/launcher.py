"""Make every run of a suite: python -m benchmark.run --suite smoke --executor local --workers 2

A run's folder is RESULTS/SUITE/ALGORITHM/TASK/SEED, and `done.json` in it is written last: a folder without it is
broken, whatever killed the run, and is resumed from its checkpoint if there is one. Finished runs are skipped, so that
the same command continues a suite. Beside the folder, SEED.log has what the script printed; whoever makes the run holds
a lock on that file, so that no run is made twice at a time. submitit starts the processes, on this machine or as one
SLURM job array.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import submitit
from tqdm import tqdm

from benchmark.common import ROOT
from benchmark.launch.plan import (
    PlannedRun,
    check,
    flag_words,
    make_plan,
    parse_algorithm,
    parse_task,
    settings_of,
    steps_of,
    write_plan,
)
from benchmark.launch.policies import games_on_the_way
from benchmark.launch.worker import (
    CHANGED_SETTINGS,
    LAST_LINES,
    Work,
    find,
    is_being_made,
    is_evaluated,
    log_path,
    make_run,
)
from benchmark.suites import MEASURED_SPS, SUITES

COST_NOTHING = ("sticky", "repeat_action_probability", "noop_max")  # arguments that change no speed
MOST_REQUEUES = 100  # of a SLURM task whose time was up
SECONDS_BETWEEN_LOOKS = {"local": 0.2, "slurm": 5.0}  # whether a job has ended


def work_locally(todo: list[Work], jobs_dir: Path, workers: int) -> Iterator[tuple[Work, Path]]:
    """Make the runs, `workers` at a time, and yield each with its job's error log as it ends."""
    waiting, in_flight = list(reversed(todo)), []
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < workers:
                work = waiting.pop()
                # A folder for each job, as submitit names files by process id, and ids come again.
                executor = submitit.LocalExecutor(jobs_dir / work.run.name.replace("/", "--"))
                executor.update_parameters(timeout_min=60 * 24 * 365)  # its default would end a run after minutes
                in_flight.append((work, executor.submit(make_run, *work)))
            time.sleep(SECONDS_BETWEEN_LOOKS["local"])
            for work, job in [(work, job) for work, job in in_flight if job.done()]:
                in_flight.remove((work, job))
                yield work, job.paths.stderr
    finally:  # if the launcher is stopped
        for _, job in in_flight:
            job.cancel()


def queued_jobs() -> set[str]:
    """Ids of this user's SLURM jobs that wait or run, array tasks as ARRAY_INDEX. Raises CalledProcessError.

    The queue, not the accounting, which a cluster need not have and without which submitit waits for ever for a task
    that died without a word. A requeued task stays in it.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def work_on_slurm(todo: list[Work], jobs_dir: Path, parameters: dict) -> Iterator[tuple[Work, Path]]:
    """Make the runs as one job array, and yield each with its job's error log as it leaves the queue."""
    executor = submitit.SlurmExecutor(jobs_dir, max_num_timeout=MOST_REQUEUES)
    executor.update_parameters(**parameters)
    try:
        jobs = executor.map_array(make_run, *zip(*todo, strict=True))
    except submitit.core.utils.FailedJobError as error:
        check(False, "executor", "slurm", f"sbatch refused the job array: {error}")
    in_flight = list(zip(todo, jobs, strict=True))
    tqdm.write(f"SLURM job array {jobs[0].job_id.split('_')[0]}; it goes on if this command is killed")
    try:
        while in_flight:
            time.sleep(SECONDS_BETWEEN_LOOKS["slurm"])
            try:
                queued = queued_jobs()
            except subprocess.CalledProcessError as error:  # the controller is busy, or away for a while
                tqdm.write(f"squeue: {error.stderr.strip()}; will ask again")
                continue
            for work, job in [(work, job) for work, job in in_flight if job.job_id not in queued]:
                in_flight.remove((work, job))
                yield work, job.paths.stderr
    finally:
        for _, job in in_flight:
            job.cancel()


def estimated_seconds(run: PlannedRun, settings: dict, cores: int) -> float | None:
    """Estimated time of a run on so many cores, in seconds; None if its speed was not measured.

    Measured are scripts with default settings, which are bf16 where it pays, and with some threads: more cores are of
    no use, and fewer take in proportion longer. The environment's settings cost nothing; of no other is it known.
    """
    own = {name: value for name, value in run.flags.items() if name in COST_NOTHING or value == "bf16"}
    if run.script not in MEASURED_SPS or settings != settings_of(replace(run, flags=own)):
        return None
    sps, threads = MEASURED_SPS[run.script]
    return steps_of(settings) / sps * threads / min(threads, cores)


def print_plan(
    plan: list[PlannedRun], settings: dict[str, dict], left: list[PlannedRun], args: argparse.Namespace
) -> None:
    """The plan, a line per algorithm and task, and an estimate of its time on the cores that it can use."""
    groups = defaultdict(list)
    for run in plan:
        groups[run.algorithm, run.label].append(run)
    for (algorithm, label), runs in groups.items():
        to_run = sum(run in left for run in runs)
        command = " ".join([runs[0].script, *flag_words({"env_id": runs[0].env_id} | runs[0].flags)])
        steps = f"{steps_of(settings[runs[0].name]):,} steps"
        print(f"{algorithm:14}  {label:26}  {to_run} of {len(runs)} seeds to run  {steps:>16}  {command}")
    estimates = [estimated_seconds(run, settings[run.name], args.cpus_per_task) for run in left]
    known = [seconds for seconds in estimates if seconds is not None]
    unknown = len(estimates) - len(known)
    most = args.array_parallelism
    if args.executor == "local":
        most = min(args.workers, max(1, os.cpu_count() // args.cpus_per_task))
    side_by_side = max(1, min(most, len(known)))
    print(f"{len(plan)} runs, {len(plan) - len(left)} finished, {len(left)} to run")
    of_these = (
        f"unknown for {unknown} of {len(left)} runs, whose speed was not measured; the others take " if unknown else ""
    )
    print(
        f"estimate: {of_these}{timedelta(seconds=round(sum(known) / side_by_side))} (h:mm:ss), {side_by_side} at a "
        f"time on {args.cpus_per_task} cores each, as fast as in docs/speed.md, with bf16 units; start-up and "
        "evaluation are not in it"
    )


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line. Raises SystemExit(2) after one line on stderr if something in it cannot work."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.run", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, help=", ".join(SUITES))
    parser.add_argument(
        "--algorithms", nargs="+", help="some of the suite's, or NAME=SCRIPT[:FLAG=VALUE,...] (default: the suite's)"
    )
    parser.add_argument(
        "--tasks", nargs="+", help="some of the suite's, or ENV_ID:STEPS[:FLAG=VALUE,...] (default: the suite's)"
    )
    parser.add_argument("--seeds", type=int, help="seeds 1 to this many (default: the suite's)")
    parser.add_argument(
        "--evaluate",
        type=int,
        metavar="N",
        help="new games that each final policy plays (0: none; default: the suite's)",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "benchmark", help="(default: runs/benchmark)")
    parser.add_argument("--executor", default="local", help="local or slurm (default: local)")
    parser.add_argument("--workers", type=int, default=1, help="local: runs side by side (1)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and an estimate of its time, and stop")
    parser.add_argument("--partition", help="slurm: its partition (default: the cluster's)")
    parser.add_argument(
        "--time",
        type=int,
        default=60 * 24,
        metavar="MIN",
        help="slurm: minutes for one task; then its run is queued again, to go on (1440)",
    )
    parser.add_argument("--gpus-per-task", type=int, default=0, help="slurm: GPUs for one run (0)")
    parser.add_argument(
        "--cpus-per-task", type=int, help="cores for one run (local: all, divided by the workers; slurm: 2)"
    )
    parser.add_argument("--array-parallelism", type=int, default=64, help="slurm: runs at a time (64)")
    args = parser.parse_args(words)
    check(args.suite in SUITES, "suite", args.suite, f"allowed: {', '.join(SUITES)}")
    check(args.executor in ("local", "slurm"), "executor", args.executor, "allowed: local, slurm")
    for flag in ("seeds", "workers", "time", "cpus-per-task", "array-parallelism"):
        given = getattr(args, flag.replace("-", "_"))
        check(given is None or given >= 1, flag, given, "must be at least 1")
    rule = "must be at least 5: SLURM may say as early as 150 s before the end that it is near"
    check(args.executor != "slurm" or args.time >= 5, "time", args.time, rule)
    check(args.gpus_per_task >= 0, "gpus-per-task", args.gpus_per_task, "must be at least 0")
    check(args.evaluate is None or args.evaluate >= 0, "evaluate", args.evaluate, "must be at least 0")
    if args.executor == "slurm" and not args.dry_run:
        absent = [command for command in ("sbatch", "srun", "squeue") if shutil.which(command) is None]
        check(not absent, "executor", "slurm", f"this machine has no {', '.join(absent)}; allowed here: local")
    if args.cpus_per_task is None:
        args.cpus_per_task = max(1, os.cpu_count() // args.workers) if args.executor == "local" else 2
    return args


def main(words: list[str] | None = None) -> int:
    """Make what is missing of a suite and return the exit code: 0, or 1 if a run failed. Raises SystemExit(2)."""
    args = parse_arguments(words)
    suite = SUITES[args.suite]
    algorithms = {}
    for text in args.algorithms or suite.algorithms:
        name, algorithm = parse_algorithm(text, suite)
        check(name not in algorithms, "algorithms", text, f"{name} is there twice")
        algorithms[name] = algorithm
    if args.tasks:
        suite = replace(suite, tasks=[parse_task(text, suite) for text in args.tasks])
        labels = [task.label for task in suite.tasks]
        check(len(set(labels)) == len(labels), "tasks", " ".join(args.tasks), "one is there twice")
    plan = make_plan(suite, algorithms, args.seeds or suite.seeds)
    suite_dir = args.results.resolve() / args.suite
    settings = {run.name: settings_of(run) for run in plan}

    games = suite.evaluate if args.evaluate is None else args.evaluate

    # A progress bar would fill the log.
    environment = {"OMP_NUM_THREADS": str(args.cpus_per_task), "TQDM_DISABLE": "1"}
    if args.executor == "local":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit would hide every GPU
    todo, left, others = [], [], []
    for run in plan:
        run_dir = suite_dir / run.name
        found = find(run_dir, run, settings[run.name])
        if found.state == "other":
            others.append(f"{run_dir}: {found.why}")
            continue
        if found.state != "finished":
            left.append(run)
        elif is_evaluated(run_dir, games):
            continue
        todo.append(Work(run, run_dir, settings[run.name], environment, games))
        if is_being_made(run_dir):
            print(f"{run.name} is being made by another launcher's worker; will wait for it")
        elif found.state == "resumable":
            print(f"{run.name} was interrupted, will be resumed from its checkpoint")
        elif found.state == "broken":
            print(f"{run.name} is broken, will be moved aside and run again: {found.why}")
    more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
    rule = "has finished runs with other settings: move them away, or give another folder: "
    check(not others, "results", str(args.results), rule + "".join(others[:1]) + more)

    if args.dry_run:
        print_plan(plan, settings, left, args)
        some = games_on_the_way(games)
        print(f"each final policy plays {games} games, each on the way {some}", end="; ")
        print(f"{len(todo) - len(left)} finished runs have only that to do")
        return 0
    write_plan(suite_dir / "plan.json", plan)
    jobs_dir = suite_dir / ".jobs" / str(time.time_ns())
    if args.executor == "local":
        ended = work_locally(todo, jobs_dir, args.workers)
    else:
        ended = work_on_slurm(todo, jobs_dir, slurm_parameters(args)) if todo else iter(())
    failed = []
    try:
        with tqdm(total=len(plan), initial=len(plan) - len(todo), unit=" runs", desc=args.suite) as bar:
            for work, job_log in ended:
                found = find(work.run_dir, work.run, work.settings)
                if found.state != "finished":
                    failed.append(work.run.name)
                    lines = job_log.read_bytes().decode(errors="replace").splitlines() if job_log.exists() else []
                    shown = lines[-LAST_LINES - 1 :] or ["its worker was killed before it wrote anything"]
                    if found.why.startswith(CHANGED_SETTINGS):
                        shown = [found.why]
                    bar.write("\n  ".join([f"FAILED {work.run.name}", *shown]), file=sys.stderr)
                    if found.why.startswith(CHANGED_SETTINGS):  # so would every run of that script: all in vain
                        print("error: stopped, as no run of that script can be finished", file=sys.stderr)
                        return 1
                elif not is_evaluated(work.run_dir, games):
                    bar.write(f"{work.run.name} is finished, but not evaluated: see {log_path(work.run_dir)}")
                bar.update()
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, and the same command continues", file=sys.stderr)
        return 130
    finally:
        if hasattr(ended, "close"):
            ended.close()  # which cancels the jobs that are left
    print(f"{len(plan) - len(failed)} of {len(plan)} runs are finished, in {suite_dir}")
    if failed:
        print(f"error: {len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def slurm_parameters(args: argparse.Namespace) -> dict:
    """submitit's names for what the command line asks of SLURM."""
    parameters = {
        "job_name": f"deep-spi-{args.suite}",
        "time": args.time,
        "cpus_per_task": args.cpus_per_task,
        "srun_args": [f"--cpus-per-task={args.cpus_per_task}"],  # which srun no longer takes from sbatch since 22.05
        "array_parallelism": args.array_parallelism,
        "additional_parameters": {"requeue": True},  # after a node failure or preemption the task is run again
    }
    optional = {"partition": args.partition, "gpus_per_node": args.gpus_per_task or None}  # one task on one node
    return parameters | {name: value for name, value in optional.items() if value is not None}
