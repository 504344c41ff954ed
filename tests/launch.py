"""Scripts as a user starts them: in a process of their own, through the real command line."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent


def launch(script: str, flags: list[str]) -> subprocess.CompletedProcess:
    """Run a script to its end. One torch thread, so that two at a time keep two cores busy and bits stay equal."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def launch_all(commands: dict[str, tuple[str, list[str]]]) -> dict[str, subprocess.CompletedProcess]:
    """Run several (script, flags), two at a time, and return what each printed and its exit code, by key."""
    with ThreadPoolExecutor(2) as pool:
        futures = {key: pool.submit(launch, *command) for key, command in commands.items()}
        return {key: future.result() for key, future in futures.items()}
