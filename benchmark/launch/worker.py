"""One run, in a process of its own: what lies in its folder, and how it is made, gone on with, or made again."""

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

import submitit

from benchmark.common import NAMES_OF_A_RUN, ROOT, is_whole, read_events, read_table
from benchmark.launch import policies
from benchmark.launch.plan import PlannedRun, flag_words, steps_of, write_json

STOPPED = 75  # exit code of a script that was told to stop, and left a checkpoint
SECONDS_TO_STOP = 60  # that a script has for this when its worker is told to stop
SECONDS_BETWEEN_WATCHES = 0.05  # over a running script; on vectors it may write several checkpoints a second
LAST_LINES = 12  # of a failed run's log that are shown
NOT_FINITE = re.compile(r"^error: .*(not finite|\bis [-+]?(nan|inf)\b)")  # the last words of a run that diverged
CHANGED_SETTINGS = "its settings are not the plan's"
RETIRED = {"spectral_norm": "exact", "compile": False}  # settings that scripts had once, at what scripts now do


class Found(NamedTuple):
    """What lies in a run's folder: `why` says it in words where it is not the finished run."""

    state: Literal["finished", "missing", "resumable", "broken", "other"]
    why: str = ""


def differences(run: PlannedRun, settings: dict, config: dict) -> str:
    """Where the config of a run is not that of the plan, in words; nothing if it is.

    Raises KeyError or TypeError if it does not describe a run.
    """
    made_with = {"script": config["script"]} | config["args"]
    planned = {"script": Path(run.script).name} | settings
    return "; ".join(
        f"{name} is {planned.get(name)!r} and was {made_with.get(name)!r}"
        for name in planned | made_with
        if name not in NAMES_OF_A_RUN
        and not (name in ("device", "precision") and name not in planned)
        and planned.get(name) != made_with.get(name)
        and not (name not in planned and made_with[name] == RETIRED.get(name, ...))
    )


def is_same_text(copy: Path, script: Path) -> bool:
    """Whether the copy of the script in the run's folder, if there is one, is what the script is now."""
    return not copy.exists() or copy.read_bytes() == script.read_bytes()


def find(run_dir: Path, run: PlannedRun, settings: dict) -> Found:
    """Whether the folder is this run, finished, made by the same script with the same settings."""
    if not run_dir.exists():
        return Found("missing")
    if not (run_dir / "config.json").exists():
        return Found("broken", "it has no config.json")
    try:
        files = {name: run_dir / f"{name}.json" for name in ("config", "done", "failed")}
        texts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.exists()}
        content = {name: json.loads(text) for name, text in texts.items()}
        changed, done = differences(run, settings, content["config"]), content.get("done")
    except json.JSONDecodeError as error:
        return Found("broken", f"one of {', '.join(path.name for path in files.values())} is not JSON: {error}")
    except (KeyError, TypeError):
        return Found("broken", "config.json does not describe a run: it has no script or no args")
    if "failed" in content:
        return Found("broken", content["failed"]["why"])
    if changed and done:
        return Found("other", changed)
    if done is None:
        if not is_same_text(run_dir / Path(run.script).name, ROOT / run.script):
            return Found("broken", f"{run.script} has changed since, and half a run of each would be a run of neither")
        resumable = not changed and is_whole(run_dir / "checkpoint.pt")
        return Found("resumable" if resumable else "broken", "it has no done.json")
    if done.get("steps") != steps_of(settings):
        return Found("broken", f"it is short: {done.get('steps')} of {steps_of(settings)} steps")
    return Found("finished")


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


def is_evaluated(run_dir: Path, games: int) -> bool:
    """Whether the final policy has played so many games, or has no weights to play them with; and those on the way."""
    return is_played(run_dir, games) and not policies.unplayed(run_dir, policies.games_on_the_way(games))


def is_played(run_dir: Path, games: int) -> bool:
    """Whether evaluation.csv has so many games of the sampled policy, or there are no weights to play them with."""
    if not any((run_dir / name).exists() for name in ("checkpoint.pt", "agent.pt")):
        return True
    return sum(row["policy"] == "sampled" for row in read_table(run_dir / "evaluation.csv")) >= games


def log_path(run_dir: Path) -> Path:
    """The run's log, beside its folder, which the script itself must make."""
    return run_dir.with_name(f"{run_dir.name}.log")


def is_being_made(run_dir: Path) -> bool:
    """Whether somebody holds the run's lock: another launcher's worker, or one that outlived its launcher."""
    if not log_path(run_dir).exists():
        return False
    with open(log_path(run_dir), encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def die_with_worker() -> None:
    """Have the kernel end this process, the script's, when its worker dies. Elsewhere than on Linux it would go on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def start(command: list[str], log: TextIO, environment: dict[str, str | None], watch: Callable[[], None]) -> int:
    """The exit code of a command that is run to its end; `watch` is called again and again, and may raise.

    Whatever is raised here, the command is told to stop first, and has SECONDS_TO_STOP for a checkpoint.
    """
    print(f"{time.ctime()}: {' '.join(command)}", file=log)
    variables = {name: value for name, value in (os.environ | environment).items() if value is not None}
    settled = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": variables}
    process = subprocess.Popen(command, **settled, preexec_fn=die_with_worker)
    scripts.append(process)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(SECONDS_BETWEEN_WATCHES)
                watch()
                return code
            watch()
    except BaseException:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_STOP)
        process.kill()
        raise


def make_run(
    run: PlannedRun, run_dir: Path, settings: dict, environment: dict[str, str | None], games: int = 0
) -> None:
    """Make the run unless it is finished, with `environment` set (None: removed) for the script. Runs in a worker.

    Then its final policy plays `games` games, unless it has, and those on the way fewer each. Waits while somebody else
    makes the run. Raises RuntimeError if the script fails or leaves an incomplete folder; not if the games fail, of
    which the log tells.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    # The script inherits the log, and with it the lock: it is free only when nobody can write to the folder any more.
    with open(log_path(run_dir), "a", encoding="utf-8", buffering=1) as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        found = find(run_dir, run, settings)
        if found.state == "other":
            raise RuntimeError(f"{run_dir} is a finished run with other settings: {found.why}")
        if found.state != "finished":
            if found.state == "broken":
                run_dir.rename(run_dir.with_name(f"{run_dir.name}.broken-{time.time_ns() // 10**6}"))
            make_it(run, run_dir, settings, environment, log)
        commands, some = [], policies.games_on_the_way(games)
        if games and not is_played(run_dir, games):
            commands.append([str(ROOT / "evaluate.py"), str(run_dir), f"--episodes={games}", "--policy=sampled"])
        if games and policies.unplayed(run_dir, some):
            commands.append(["-m", policies.__name__, str(run_dir), f"--episodes={some}"])
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        for command in commands:
            code = start([sys.executable, *command], log, environment | {"PYTHONPATH": path}, watch=lambda: None)
            if code:
                name = Path(command[0]).name if command[0] != "-m" else command[1]
                print(f"the run is finished, but was not evaluated: {name} ended with code {code}", file=log)


def make_it(run: PlannedRun, run_dir: Path, settings: dict, environment: dict[str, str | None], log: TextIO) -> None:
    """Start the script, which goes on from the folder's checkpoint if there is one, and write done.json after it.

    Raises RuntimeError as `make_run` does. A failure after which the run must not go on is written into failed.json:
    settings that are not the plan's, and what is not finite. Gone on with, in fresh environments, a run that diverged
    might not diverge again: no fair seed.
    """
    own = {"env_id": run.env_id, "seed": run.seed, "total_timesteps": run.total_timesteps, "run_dir": run_dir}
    interval, keeper = {}, None
    if "checkpoint_interval" in settings:
        interval = {"checkpoint_interval": policies.checkpoint_interval(settings)}
        keeper = policies.Keeper(run_dir, settings)
    command = [sys.executable, str(ROOT / run.script), *flag_words(interval | run.flags | own)]
    looked_at = []

    def watch() -> None:
        """What is done while the script runs."""
        compare()
        if keeper:
            keeper.look()

    def compare() -> None:
        """Stop the script as soon as its config.json is another than the plan's."""
        if looked_at:
            return
        try:
            config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):  # not yet there, or not yet all of it
            return
        looked_at.append(True)
        if changed := differences(run, settings, config):
            why = f"{CHANGED_SETTINGS}: {changed}. {run.script} must write into config.json what it was given"
            write_json(run_dir / "failed.json", {"why": why})
            raise RuntimeError(why)

    began = log.tell()
    code = STOPPED
    while code == STOPPED:  # by a signal to the script alone: its worker, this process, is to go on
        code = start(command, log, environment, watch)
    if code:
        said = log_path(run_dir).read_bytes()[began:].decode(errors="replace").splitlines()
        if run_dir.exists() and (term := next(filter(NOT_FINITE.search, reversed(said[-LAST_LINES:])), "")):
            write_json(run_dir / "failed.json", {"why": f"it diverged: {term.strip()}"})
        raise RuntimeError("\n".join([f"the script ended with code {code}, and last wrote:", *said[-LAST_LINES:]]))
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


class Work(NamedTuple):
    """The arguments of `make_run`."""

    run: PlannedRun
    run_dir: Path
    settings: dict
    environment: dict[str, str | None]
    games: int = 0  # that the final policy plays in the end
