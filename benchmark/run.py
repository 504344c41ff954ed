"""Make every run of a suite: python -m benchmark.run --suite smoke --executor local --workers 2

A run's folder is RESULTS/SUITE/ALGORITHM/TASK/SEED, and `done.json` in it is written last: a folder without it is
broken, whatever killed the run, and is resumed from its checkpoint if there is one. Finished runs are skipped, so that
the same command continues a suite. Beside the folder, SEED.log has what the script printed; whoever makes the run holds
a lock on that file, so that no run is made twice at a time. submitit starts the processes, on this machine or as one
SLURM job array.
"""

import argparse
import contextlib
import ctypes
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import submitit
import tyro
from tqdm import tqdm

from benchmark.collect import read_events
from benchmark.suites import MEASURED_SPS, SUITES, Algorithm, Suite

ROOT = Path(__file__).resolve().parent.parent
# Arguments that change nothing in what is learned.
NAMES_OF_A_RUN = ("runs_dir", "run_name", "track", "checkpoint_interval", "resume")
STOPPED = 75  # exit code of a script that was told to stop, and left a checkpoint
SECONDS_TO_STOP = 60  # that a script has for this when its worker is told to stop
COST_NOTHING = ("sticky", "repeat_action_probability", "noop_max")  # arguments that change no speed
NAMED_BY_THE_PLAN = ("env_id", "seed", "total_timesteps", "runs_dir", "run_name")
MOST_REQUEUES = 100  # of a SLURM task whose time was up
LAST_LINES = 12  # of a failed run's log that are shown
SECONDS_BETWEEN_LOOKS = {"local": 0.2, "slurm": 5.0}  # whether a job has ended


@dataclass(frozen=True)
class Run:
    """One run of the plan. `label` names the task's folder: env_id, or a variant of it."""

    algorithm: str
    label: str
    env_id: str
    seed: int
    script: str
    flags: dict[str, object]
    total_timesteps: int

    @property
    def name(self) -> str:
        """The run's folder, relative to the suite's."""
        return f"{self.algorithm}/{self.label}/{self.seed}"


class Found(NamedTuple):
    """What lies in a run's folder: `why` says it in words where it is not the finished run."""

    state: Literal["finished", "missing", "resumable", "broken", "other"]
    why: str = ""


def check(allowed: bool, flag: str, given: object, rule: str) -> None:
    """Refuse a bad argument in one line. Raises SystemExit(2)."""
    if not allowed:
        print(f"error: --{flag}: got {given!r}; {rule}", file=sys.stderr)
        raise SystemExit(2)


# ---- The plan


def parse_algorithm(text: str, suite: Suite) -> tuple[str, Algorithm]:
    """An algorithm's name, and what it is: one of the suite's, or NAME=SCRIPT[:FLAG=VALUE,...].

    Raises SystemExit(2) for a name or a script that there is not.
    """
    name, is_new, definition = text.partition("=")
    if not is_new:
        rule = f"allowed: {', '.join(suite.algorithms)}, or NAME=SCRIPT[:FLAG=VALUE,...]"
        check(name in suite.algorithms, "algorithms", text, rule)
        return name, suite.algorithms[name]
    check(re.fullmatch(r"\w[\w.-]*", name) is not None, "algorithms", text, "NAME: letters, digits, '_', '-' and '.'")
    script, _, settings = definition.partition(":")
    check(script.endswith(".py"), "algorithms", text, f"SCRIPT is a Python file, *.py, not {script!r}")
    path = next((path for path in (Path(script).resolve(), ROOT / script) if path.is_file()), None)
    check(path is not None, "algorithms", text, f"there is no script {script}")
    flags = {}
    for setting in filter(None, settings.split(",")):
        flag, has_value, value = setting.partition("=")
        check(bool(has_value), "algorithms", text, f"settings are FLAG=VALUE,..., not {setting!r}")
        flags[flag.replace("-", "_")] = {"True": True, "False": False}.get(value, value)
    return name, Algorithm(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path), flags)


def make_plan(suite: Suite, algorithms: dict[str, Algorithm], seeds: int) -> list[Run]:
    """Every run of the suite, seed by seed, so that an early stop leaves all algorithms with equally many."""
    return [
        Run(name, task.label, task.env_id, seed, algorithm.script, task.flags | algorithm.flags, task.total_timesteps)
        for seed in range(1, seeds + 1)
        for task in suite.tasks
        for name, algorithm in algorithms.items()
    ]


def flag_words(flags: dict[str, object]) -> list[str]:
    """Settings as words of a command line; a switch is --name or --no-name."""
    words = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        words.append(f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}")
    return words


@functools.cache
def script_args(script: str) -> type:
    """The script's `Args`, which are its settings and their defaults. Raises SystemExit(2) if it has none."""
    spec = importlib.util.spec_from_file_location(f"script {script}", ROOT / script)  # a name that no import has
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    check(hasattr(module, "Args"), "algorithms", script, "the script needs its settings in a dataclass Args")
    return module.Args


@functools.cache
def parse_flags(script: str, words: tuple[str, ...]) -> dict[str, object]:
    """All settings of the script, as it would read them from this command line. Raises SystemExit(2) for bad ones."""
    args_class = script_args(script)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro's own message is a box of many lines
            return vars(tyro.cli(args_class, args=words))
    except SystemExit:
        check(False, "algorithms", " ".join(words), f"not a setting of {script}: see python {script} --help")


def settings_of(run: Run) -> dict[str, object]:
    """Every setting that the run's config.json must have but those that name the run. Raises SystemExit(2)."""
    allowed = [field.name for field in fields(script_args(run.script)) if field.name not in NAMED_BY_THE_PLAN]
    for flag in run.flags:
        closest = ", ".join(difflib.get_close_matches(flag, allowed, cutoff=0.4)) or ", ".join(allowed)
        check(flag in allowed, "algorithms", flag, f"not for an algorithm to set in {run.script}; closest: {closest}")
    settings = parse_flags(run.script, tuple(flag_words(run.flags)))
    settings = settings | {"env_id": run.env_id, "seed": run.seed, "total_timesteps": run.total_timesteps}
    settings = {name: value for name, value in settings.items() if name not in NAMES_OF_A_RUN}
    return json.loads(json.dumps(settings))  # as config.json will have them


def steps_of(settings: dict) -> int:
    """The last global step of a complete run: its steps, rounded down to whole rollouts."""
    rollout = settings.get("num_envs", 1) * settings.get("num_steps", 1)
    return settings["total_timesteps"] // rollout * rollout


def write_plan(path: Path, plan: list[Run]) -> None:
    """Write the runs in place of what the file had of them; runs planned earlier stay in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:  # other launchers may plan into the same folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        planned = json.loads(path.read_text()) if path.exists() else []
        runs = {(run["algorithm"], run["label"], run["seed"]): run for run in planned + [asdict(run) for run in plan]}
        write_json(path, list(runs.values()))


def write_json(path: Path, content: object) -> None:
    """Write the file so that whatever happens it is there whole, or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---- One run, in a worker


def find(run_dir: Path, run: Run, settings: dict) -> Found:
    """Whether the folder is this run, finished, made by the same script with the same settings."""
    if not run_dir.exists():
        return Found("missing")
    if not (run_dir / "config.json").exists():
        return Found("broken", "it has no config.json")
    try:
        config = json.loads((run_dir / "config.json").read_text())
        done = json.loads((run_dir / "done.json").read_text()) if (run_dir / "done.json").exists() else None
        made_with = {"script": config["script"]} | config["args"]
    except json.JSONDecodeError as error:
        return Found("broken", f"config.json or done.json is not JSON: {error}")
    except (KeyError, TypeError):
        return Found("broken", "config.json does not describe a run: it has no script or no args")
    planned = {"script": Path(run.script).name} | settings
    changed = [
        f"{name} is {planned.get(name)!r} and was {made_with.get(name)!r}"
        for name in planned | made_with
        if name not in NAMES_OF_A_RUN and planned.get(name) != made_with.get(name)
    ]
    if changed and done:
        return Found("other", "; ".join(changed))
    if done is None:
        resumable = not changed and can_go_on(run_dir, settings)
        return Found("resumable" if resumable else "broken", "it has no done.json")
    if done.get("steps") != steps_of(settings):
        return Found("broken", f"it is short: {done.get('steps')} of {steps_of(settings)} steps")
    return Found("finished")


def can_go_on(run_dir: Path, settings: dict) -> bool:
    """Whether a run without done.json has a whole checkpoint, and was not ended by what is not finite.

    A diverged run has weights and is short. Resumed, with fresh environments, it might not diverge again: no fair seed.
    """
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        return False
    content = path.read_bytes()
    logged = read_events(run_dir).get("charts/SPS")
    steps = int(logged[0][-1]) if logged else 0
    whole = hashlib.sha256(content[32:]).digest() == content[:32]
    return whole and (steps == steps_of(settings) or not (run_dir / "agent.pt").exists())


def measure(run_dir: Path, settings: dict) -> dict[str, float]:
    """The content of done.json. Raises RuntimeError if the run lacks its weights or its last steps."""
    if not (run_dir / "agent.pt").exists():
        raise RuntimeError("the script ended well, but wrote no agent.pt")
    logged = read_events(run_dir).get("charts/SPS")
    if logged is None:
        raise RuntimeError("the script ended well, but logged no charts/SPS")
    steps, sps = int(logged[0][-1]), float(logged[1][-1])
    if steps != steps_of(settings):
        raise RuntimeError(f"the script ended well, but after {steps} of {steps_of(settings)} steps")
    return {"steps": steps, "minutes": steps / sps / 60, "sps": sps}


def log_path(run_dir: Path) -> Path:
    """The run's log, beside its folder, which the script itself must make."""
    return run_dir.with_name(f"{run_dir.name}.log")


def is_being_made(run_dir: Path) -> bool:
    """Whether somebody holds the run's lock: another launcher's worker, or one that outlived its launcher."""
    if not log_path(run_dir).exists():
        return False
    with open(log_path(run_dir)) as log:
        try:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def die_with_worker() -> None:
    """Have the kernel end this process, the script's, when its worker dies. Elsewhere than on Linux it would go on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def make_run(run: Run, run_dir: Path, settings: dict, environment: dict[str, str | None]) -> None:
    """Make the run unless it is finished, with `environment` set (None: removed) for the script. Runs in a worker.

    Waits while somebody else makes it. Raises RuntimeError if the script fails or leaves an incomplete folder.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    # The script inherits the log, and with it the lock: it is free only when nobody can write to the folder any more.
    with open(log_path(run_dir), "a", buffering=1) as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        found = find(run_dir, run, settings)
        if found.state == "finished":
            return
        if found.state == "other":
            raise RuntimeError(f"{run_dir} is a finished run with other settings: {found.why}")
        own = {"env_id": run.env_id, "seed": run.seed, "total_timesteps": run.total_timesteps}
        own |= {"runs_dir": run_dir.parent, "run_name": run_dir.name}
        command = [sys.executable, str(ROOT / run.script), *flag_words(run.flags | own)]
        variables = {name: value for name, value in (os.environ | environment).items() if value is not None}

        def start(*more: str) -> int:
            """The exit code of the script, run to its end."""
            print(f"{time.ctime()}: {' '.join([*command, *more])}", file=log)
            settled = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": variables}
            process = subprocess.Popen([*command, *more], **settled, preexec_fn=die_with_worker)
            scripts.append(process)
            try:
                return process.wait()
            except BaseException:  # the worker is told to stop: the script may write a checkpoint first
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SECONDS_TO_STOP)
                process.kill()
                raise

        if found.state == "broken":
            run_dir.rename(run_dir.with_name(f"{run_dir.name}.broken-{time.time_ns() // 10**6}"))
        code = start(*(["--resume"] if found.state == "resumable" else []))
        while code == STOPPED:  # by a signal to the script alone: its worker, this process, is to go on
            code = start("--resume")
        if code:
            lines = log_path(run_dir).read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise RuntimeError("\n".join([f"the script ended with code {code}, and last wrote:", *lines]))
        write_json(run_dir / "done.json", measure(run_dir, settings))


scripts: list[subprocess.Popen] = []  # those that this worker started; at most the last is running


def stop_for_now(*work) -> submitit.helpers.DelayedSubmission:
    """Let the script write its checkpoint and end, and give the job to do later: `make_run` with the same arguments.

    submitit calls this when SLURM's time for the task is nearly up, and then requeues the task.
    """
    for script in scripts[-1:]:
        script.terminate()
        deadline = time.monotonic() + SECONDS_TO_STOP
        # This interrupts `make_run` where it waits for the script, so the end is to be seen here, but taken there.
        look = functools.partial(os.waitid, os.P_PID, script.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        while script.returncode is None and look() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    return submitit.helpers.DelayedSubmission(make_run, *work)


make_run.checkpoint = stop_for_now  # the name that submitit looks for


# ---- All runs


class Work(NamedTuple):
    """The arguments of `make_run`."""

    run: Run
    run_dir: Path
    settings: dict
    environment: dict[str, str | None]


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


def estimated_seconds(run: Run, settings: dict, cores: int) -> float | None:
    """Estimated time of a run on so many cores, in seconds; None if its speed was not measured.

    Measured are scripts with default settings, which are bf16 where it pays, and with some threads: more cores are of
    no use, and fewer take in proportion longer. The environment's settings cost nothing; of no other is it known.
    """
    own = {name: value for name, value in run.flags.items() if name in COST_NOTHING or value == "bf16"}
    if run.script not in MEASURED_SPS or settings != settings_of(replace(run, flags=own)):
        return None
    sps, threads = MEASURED_SPS[run.script]
    return steps_of(settings) / sps * threads / min(threads, cores)


def print_plan(plan: list[Run], settings: dict[str, dict], todo: list[Work], args: argparse.Namespace) -> None:
    """The plan, a line per algorithm and task, and an estimate of its time on the cores that it can use."""
    left = [work.run for work in todo]
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
    print(
        f"estimate: {timedelta(seconds=round(sum(known) / side_by_side))} (h:mm:ss), {side_by_side} at a time on "
        f"{args.cpus_per_task} cores each, as fast as README's, with bf16 units"
        + (f"; not in it: {unknown} runs of scripts or with settings whose speed was not measured" if unknown else "")
    )


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line. Raises SystemExit(2) after one line on stderr if something in it cannot work."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.run", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, help=", ".join(SUITES))
    parser.add_argument(
        "--algorithms", nargs="+", help="some of the suite's, or NAME=SCRIPT[:FLAG=VALUE,...] (default: the suite's)"
    )
    parser.add_argument("--seeds", type=int, help="seeds 1 to this many (default: the suite's)")
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
    plan = make_plan(suite, algorithms, args.seeds or suite.seeds)
    suite_dir = args.results.resolve() / args.suite
    settings = {run.name: settings_of(run) for run in plan}

    # A progress bar would fill the log.
    environment = {"OMP_NUM_THREADS": str(args.cpus_per_task), "TQDM_DISABLE": "1"}
    if args.executor == "local":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit would hide every GPU
    todo, others = [], []
    for run in plan:
        run_dir = suite_dir / run.name
        found = find(run_dir, run, settings[run.name])
        if found.state == "other":
            others.append(f"{run_dir}: {found.why}")
        elif found.state != "finished":
            todo.append(Work(run, run_dir, settings[run.name], environment))
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
        print_plan(plan, settings, todo, args)
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
                    lines = job_log.read_text(errors="replace").splitlines() if job_log.exists() else []
                    shown = lines[-LAST_LINES - 1 :] or ["its worker was killed before it wrote anything"]
                    bar.write("\n  ".join([f"FAILED {work.run.name}", *shown]), file=sys.stderr)
                bar.update()
    except KeyboardInterrupt:
        ended.close()
        print("stopped; finished runs are kept, and the same command continues", file=sys.stderr)
        return 130
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


if __name__ == "__main__":
    from benchmark import run  # by its name, not as __main__, so that workers can import what is sent to them

    raise SystemExit(run.main())
