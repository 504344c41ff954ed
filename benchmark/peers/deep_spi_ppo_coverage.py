"""`deep_spi_ppo.py` with what its rollouts cover: python -m benchmark.peers.deep_spi_ppo_coverage --num-envs 8

It is that script, with its settings and its folder, and three more metrics: coverage.py.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import deep_spi_ppo as script
from benchmark.common import speak_utf8
from benchmark.peers.coverage import EndOfRun, parts
from deep_spi_ppo import Agent, Args, Games  # noqa: F401 - what evaluate.py looks for in a script


def train(args: Args) -> None:
    """As the script does. The run's folder names this file, and has a copy of it."""
    with mock.patch.multiple(script, **parts(script, args), __file__=__file__), contextlib.suppress(EndOfRun):
        script.train(args)


if __name__ == "__main__":
    speak_utf8()
    try:
        train(tyro.cli(Args, description=__doc__))
    except (FloatingPointError, OSError) as error:
        sys.exit(f"\nerror: {error}")
