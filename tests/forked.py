"""A function in a fork of this process, which has loaded the libraries and used none: their seconds are paid once."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


def in_fork(function: Callable[[], None], folder: Path, seconds: float) -> tuple[int, str]:
    """Call function() in a fork of this process, in the folder: exit code, or minus the signal that ended it; output.

    SIGALRM stands for a hang: the process was ended after so many seconds.
    """
    log = folder / "log"
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 1
        try:
            function()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM, log.read_text(errors="replace")
