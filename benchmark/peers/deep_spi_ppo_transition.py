"""`deep_spi_ppo.py` with another P̄: python -m benchmark.peers.deep_spi_ppo_transition --transition-residual

It is that script, with its settings and its folder, and two more flags; what they do: transition_variants.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import deep_spi_ppo as script
from benchmark.common import speak_utf8
from benchmark.peers.transition_variants import SCRIPTS_SCALE, check, variant
from deep_spi_ppo import Games  # noqa: F401 - what evaluate.py looks for in a script


@dataclass
class Args(script.Args):
    transition_scale: float = SCRIPTS_SCALE  # standard deviation of P̄'s components at the start
    transition_residual: bool = False  # z̄' = z + Δ, where Δ is what the script's P̄ gives

    def __post_init__(self):
        super().__post_init__()
        check(self)


class Agent(script.Agent):
    """The script's agent with the other P̄."""

    def __init__(self, num_inputs: int, num_actions: int, transition_scale: float, transition_residual: bool):
        with mock.patch.object(script, "TransitionModel", variant(script, transition_scale, transition_residual)):
            super().__init__(num_inputs, num_actions)


def train(args: Args) -> None:
    """As the script does. The run's folder names this file, and has a copy of it."""
    transition_model = variant(script, args.transition_scale, args.transition_residual)
    with mock.patch.multiple(script, TransitionModel=transition_model, __file__=__file__):
        script.train(args)


if __name__ == "__main__":
    speak_utf8()
    try:
        train(tyro.cli(Args, description=__doc__))
    except (FloatingPointError, OSError) as error:
        sys.exit(f"\nerror: {error}")
