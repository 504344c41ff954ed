"""Random command lines for a training script: python -m tests.fuzz_command_line [SCRIPT ...] [--examples 500]

Whatever the flags, a script must make a clean run, or say what is wrong in one line (or in tyro's box, for what is not
even of a flag's type) and end with exit code 2, or 1 where training met something that is not finite. Never a
traceback, a hang, or a process that dies; a clean run says that it is complete. Each command line is run in a fork of
this process, which has loaded the libraries and used none, so that the seconds they take are paid once. Not tried:
sizes that are allowed and take for ever, and --run-dir / with what that would leave.
"""

import argparse
import importlib
import os
import signal
import sys
import tempfile
import textwrap
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import envpool
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from tests.forked import in_fork

SCRIPTS = ("deep_spi_ppo", "deep_spi_ppo_atari", "deepmdp_ppo_atari", "ppo_baseline")
SCRIPTS += ("spr_ppo_atari", "dbc_ppo_atari", "deep_spi_ppo_continuous", "dream_spi", "dream_spi_atari")
SMALL = (
    "--num-envs 2 --num-steps 4 --total-timesteps 16 --num-minibatches 1 --update-epochs 1 --chunk-length 1 --seed 1"
)
SECONDS = 120  # after which a process counts as hung; a clean run takes one or two
INTEGERS = ("-9999999999", "-1", "0", "1", "2", "3", "4", "7", "2147483648", "99999999999999999999", "1.5", "x", "")
SIZES = ("-1", "0", "1", "2", "3", "4", "8", "1.5", "x", "")  # of what may take as long as it is large
FLOATS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "-0.0",
    "0",
    "1e-300",
    "1e-9",
    "0.1",
    "0.5",
    "1",
    "1.0000001",
    "1e30",
    "1e300",
    "x",
)
WORDS = ("", "x", "run", "a/b", "../up", ".", "..", "-", "--seed", "/dev/null", "/dev/null/x", "/proc/x", "/sys", "log")
WORDS += ("ü ☃", "\udcff", "x" * 300, "x" * 255, "%s {}", "a\nb", "$HOME", "~")
GAMES = ("Pong-v5", "Boxing-v5", "Breakout-v5", "CartPole-v1", "FrozenLake-v1", "Pendulum-v1", "Hopper-v4", "pong", "")
LONG = {"total_timesteps", "num_envs", "num_steps", "update_epochs", "num_minibatches", "chunk_length"}


def words_of(field) -> st.SearchStrategy[list[str]]:
    """The flag of a field of Args, with a value that may or may not be allowed."""
    name = "--" + field.name.replace("_", "-")
    if field.type is bool:
        return st.sampled_from([[name], ["--no-" + name[2:]], [name, "x"]])
    if field.name == "env_id":
        values = st.sampled_from(GAMES) | st.sampled_from(sorted(envpool.list_all_envs()))
    elif choices := get_args(field.type):
        values = st.sampled_from([*(str(choice) for choice in choices if isinstance(choice, str)), *WORDS])
    elif field.type is int:
        values = st.sampled_from(SIZES if field.name in LONG else INTEGERS)
    else:
        values = st.sampled_from(FLOATS if field.type is float else WORDS)
    return values.map(lambda value: [name, value]) | st.just([name])


def command_lines(script) -> st.SearchStrategy[list[str]]:
    """Up to three flags after those that keep a run small; now and then one that there is not."""
    flags = [words_of(field) for field in fields(script.Args)]
    unknown = st.sampled_from([["--no-such-flag"], ["word"], ["-h"]])
    chosen = st.lists(st.one_of(*flags, unknown), max_size=3)
    return chosen.map(lambda groups: [*SMALL.split(), "--device", "cpu", *(word for group in groups for word in group)])


def run(script, words: list[str], folder: Path) -> tuple[int, str]:
    """The command line in a fork of this process: exit code, or minus the signal that ended it, and its output."""
    sys.argv = [f"{script.__name__}.py", *words]
    code = compile(main_block(script), script.__file__, "exec")
    return in_fork(lambda: exec(code, vars(script)), folder, SECONDS)


def main_block(script) -> str:
    """What stands under `if __name__ == "__main__":` in the script."""
    source = Path(script.__file__).read_text()
    return textwrap.dedent(source.split('if __name__ == "__main__":\n', 1)[1])


def judge(code: int, output: str) -> str:
    """What is wrong with how a command line ended, or nothing."""
    if "Traceback" in output:
        return "a traceback"
    if code == 0:
        return ""
    if code < 0:
        return "a hang" if code == -signal.SIGALRM else f"ended by {signal.Signals(-code).name}"
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    if code == 2:
        boxes = [line for line in output.splitlines() if line.startswith("╭─ ")]
        return "" if boxes or len(errors) == 1 else f"exit code 2 with {len(errors)} lines that say why"
    if code == 1:
        return "" if errors and "not finite" in errors[0] else "exit code 1, and not for what is not finite"
    return f"exit code {code}"


def fuzz(name: str, examples: int, seed: int) -> dict[int, int]:
    """How many command lines ended with which exit code. Raises AssertionError for the first that ended badly."""
    script, codes = importlib.import_module(name), {}
    os.environ["WANDB_MODE"] = "disabled"  # --track is not to call home
    with tempfile.TemporaryDirectory() as folder:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(words=command_lines(script))
        def one(words):
            own = Path(tempfile.mkdtemp(dir=folder))
            code, output = run(script, words, own)
            codes[code] = codes.get(code, 0) + 1
            wrong = judge(code, output)
            if code == 0 and "-h" not in words and ": complete" not in output:
                wrong = wrong or "exit code 0, and no run that is complete"
            assert not wrong, f"{name}.py {' '.join(map(repr, words))}: {wrong}\n{output[-3000:]}"

        with_seed(seed)(one)()
    return codes


def main() -> None:
    """Fuzz the scripts, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_command_line", description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), metavar="SCRIPT", help=", ".join(SCRIPTS))
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.scripts:
        start = time.monotonic()
        codes = fuzz(name.removesuffix(".py"), arguments.examples, arguments.seed)
        counts = ", ".join(f"{count} with exit code {code}" for code, count in sorted(codes.items()))
        print(f"{name}: {counts}; {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
