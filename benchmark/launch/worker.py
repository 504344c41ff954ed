"""One run, in a process of its own: what lies in its folder, and how it is made, gone on with, or made again."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import submitit

from benchmark.common import NAMES_OF_A_RUN, ROOT, read_events
from benchmark.launch.plan import PlannedRun, flag_words, steps_of, write_json

STOPPED = 75  # exit code of a script that was told to stop, and left a checkpoint
SECONDS_TO_STOP = 60  # that a script has for this when its worker is told to stop
LAST_LINES = 12  # of a failed run's log that are shown


class Found(NamedTuple):
    """What lies in a run's folder: `why` says it in words where it is not the finished run."""

    state: Literal["finished", "missing", "resumable", "broken", "other"]
    why: str = ""


def find(run_dir: Path, run: PlannedRun, settings: dict) -> Found:
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


def make_run(run: PlannedRun, run_dir: Path, settings: dict, environment: dict[str, str | None]) -> None:
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


class Work(NamedTuple):
    """The arguments of `make_run`."""

    run: PlannedRun
    run_dir: Path
    settings: dict
    environment: dict[str, str | None]
