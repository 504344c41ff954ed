"""Deep SPI with the published code's spectral norm: python -m benchmark.peers.deep_spi_published_norm --env-id Pong-v5

It is `deep_spi_ppo_atari.py`, with its settings and its folder, but for what P̄'s and R̄'s weights are divided by:
published_norm.py.
"""

import sys
from pathlib import Path
from unittest import mock

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import deep_spi_ppo_atari as script
from benchmark.common import speak_utf8
from benchmark.peers.published_norm import patch
from deep_spi_ppo_atari import Args, Games  # noqa: F401 - what evaluate.py looks for in a script


class Agent(script.Agent):
    """The script's agent with the published rule."""

    def __init__(self, num_actions: int):
        with patch(script):
            super().__init__(num_actions)


def train(args: Args) -> None:
    """As the script does. The run's folder names this file, and has a copy of it."""
    with patch(script), mock.patch.object(script, "__file__", __file__):
        script.train(args)


if __name__ == "__main__":
    speak_utf8()
    try:
        train(tyro.cli(Args, description=__doc__))
    except (FloatingPointError, OSError) as error:
        sys.exit(f"\nerror: {error}")
