"""Every environment that EnvPool lists, through a script's own check: python -m tests.every_environment [SCRIPT ...]

Each id must be refused in one line, with exit code 2, or really work: reset and two steps of two environments, with
observations, rewards and flags of the promised shapes. Each is tried in a fork of this process, which has loaded the
libraries and used none, as some environments end a process that makes them.
"""

import argparse
import importlib
import signal
import sys
import tempfile
from pathlib import Path

import envpool
import torch

from tests.forked import in_fork

SCRIPTS = ("deep_spi_ppo", "ppo_baseline")  # one for vectors, one for Atari, whose siblings have the same text
SECONDS = 120  # after which a process counts as hung


def play(script, env_id: str) -> None:
    """Check the id, reset, make two steps. Raises SystemExit(2) if it is refused, AssertionError if it is broken."""
    args = script.Args(env_id=env_id, num_envs=2, num_steps=8, num_minibatches=1, device="cpu")
    games = script.Games(args)
    first = games.reset()
    assert len(first) == 2 and first.float().isfinite().all()
    for step in range(2):
        obs, rewards, is_terminal, is_last, episodes = games.step(torch.full((2,), step % games.num_actions))
        assert obs.shape == first.shape and obs.dtype == first.dtype and obs.float().isfinite().all()
        assert rewards.shape == is_terminal.shape == is_last.shape == (2,) and rewards.isfinite().all()
        assert is_terminal.dtype == is_last.dtype == torch.bool and set(episodes) <= {0, 1}


def judge(code: int, output: str, env_id: str) -> str:
    """What is wrong with how an id was met, or nothing."""
    lines = output.splitlines()
    if code == 2:
        refused = len(lines) == 1 and lines[0].startswith(f"error: --env-id: got {env_id!r}; ")
        return "" if refused else f"refused in {len(lines)} lines: {output[-2000:]}"
    if code == 0:
        return f"works, and prints {output[-2000:]}" if output else ""
    how = "a hang" if code == -signal.SIGALRM else f"exit code {code}" if code > 0 else signal.Signals(-code).name
    return f"{how}: {output[-2000:]}"


def survey(name: str, env_ids: list[str]) -> tuple[list[str], dict[str, str]]:
    """The ids that work with a script, and what is wrong with those that neither work nor are refused in one line."""
    script, works, wrong = importlib.import_module(name), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for env_id in env_ids:
            code, output = in_fork(lambda env_id=env_id: play(script, env_id), Path(folder), SECONDS)
            if problem := judge(code, output, env_id):
                wrong[env_id] = problem
            elif code == 0:
                works.append(env_id)
    return works, wrong


def main() -> None:
    """Print the ids that work, and raise SystemExit(1) if any is met badly."""
    parser = argparse.ArgumentParser(prog="python -m tests.every_environment", description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), metavar="SCRIPT")
    parser.add_argument("--env-ids", nargs="*", default=sorted(envpool.list_all_envs()))
    arguments = parser.parse_args()
    bad = 0
    for name in arguments.scripts:
        works, wrong = survey(name.removesuffix(".py"), arguments.env_ids)
        refused = len(arguments.env_ids) - len(works) - len(wrong)
        print(f"{name}: {refused} refused, {len(wrong)} neither; {len(works)} work: {' '.join(works)}", flush=True)
        for env_id, problem in wrong.items():
            print(f"{env_id}: {problem}", flush=True)
        bad += len(wrong)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
