"""`deep_spi_ppo_atari.py`, stopped early: python -m benchmark.peers.deep_spi_ppo_atari_coverage --num-envs 8

It is that script, with its settings and its folder. What it adds: three more metrics (coverage.py), and a step size
that falls as in a longer run. PPO with both coefficients 0.
"""

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import deep_spi_ppo_atari as script
from benchmark.common import speak_utf8
from benchmark.peers.coverage import EndOfRun, parts
from deep_spi_ppo_atari import Agent, Games  # noqa: F401 - what evaluate.py looks for in a script


@dataclass
class Args(script.Args):
    anneal_over: int = 10_000_000  # steps over which the step size would fall to 0; the run ends after its own

    def __post_init__(self):
        super().__post_init__()
        self.check("anneal_over", self.anneal_over >= self.total_timesteps, "must be at least total_timesteps")


def train(args: Args) -> None:
    """As the script does. The run's folder names this file, and has a copy of it."""
    schedule = replace(args, total_timesteps=args.anneal_over)
    with mock.patch.multiple(script, **parts(script, args), __file__=__file__), contextlib.suppress(EndOfRun):
        script.train(schedule)


if __name__ == "__main__":
    speak_utf8()
    try:
        train(tyro.cli(Args, description=__doc__))
    except (FloatingPointError, OSError) as error:
        sys.exit(f"\nerror: {error}")
