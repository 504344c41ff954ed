"""`dream_spi.py`, and what the published code does otherwise: benchmark/peers/dream_spi_published.py --lost-dones

It is that script, with its settings and its folder, and a flag for each difference (docs/dreamspi.md has their list):
what each does to the return, the study in benchmark/studies/planning.py measures.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import dream_spi as script
from benchmark.common import speak_utf8
from dream_spi import Agent, Games  # noqa: F401 - what evaluate.py looks for in a script


@dataclass
class Args(script.Args):
    stale_gradients: bool = False  # at the old weights of an update's second part
    learned_dummies: bool = False  # dummy rows count: z' <- z, not terminal; so do dreams from them
    lost_dones: bool = False  # a quarter of the sampled dones is lost in a cast to integers
    final_limits: bool = False  # a time limit is an end like any other


class StaleLoss:
    """A loss whose gradients are the published ones: at the first part's current weights, and the others' old ones.

    `stale` is the agent as it was when the update began. Its first part is brought up to date before each loss.
    """

    def __init__(self, agent: nn.Module, stale: nn.Module, first: str, loss_of: Callable):
        with torch.no_grad():
            for ours, current in zip(stale.parts()[first], agent.parts()[first], strict=True):
                ours.copy_(current)
        self.agent, self.stale = agent, stale
        self.loss, self.stats = loss_of(stale)

    def backward(self, inputs: list[nn.Parameter]) -> None:
        """As Tensor.backward."""
        of_stale = dict(zip(self.agent.parameters(), self.stale.parameters(), strict=True))
        self.stale.zero_grad()
        self.loss.backward(inputs=[of_stale[parameter] for parameter in inputs])
        for parameter in inputs:
            gradient = of_stale[parameter].grad
            parameter.grad = None if gradient is None else gradient.clone()


class Published:
    """The script's functions, each with what the published code does, where the flag asks for it."""

    def __init__(self, args: Args):
        self.args, self.stale = args, None  # the agent when the update began that goes on; None: none has

    def model_loss(self, agent: nn.Module, batch, noise: Tensor, args: Args) -> tuple:
        """As the script's; `stale_gradients`, `learned_dummies`."""
        if self.args.learned_dummies:  # as chunks of one step, whose s' is s in a dummy
            s, next_s = batch.obs[:, :-1].flatten(0, 1), batch.obs[:, 1:].flatten(0, 1)
            next_s = torch.where(batch.mask[:, None] > 0, next_s, s)
            batch = batch._replace(obs=torch.stack((s, next_s), dim=1), mask=torch.ones_like(batch.mask))
        return self.loss(agent, "encoder", lambda of: MODEL_LOSS(of, batch, noise, args))

    def compute_loss(self, agent: nn.Module, batch, z: Tensor, penalty: Tensor | float, *others) -> tuple:
        """As the script's; `stale_gradients`, where it is imagination's: the one without a penalty."""
        if isinstance(penalty, Tensor):  # a part of model_loss
            return COMPUTE_LOSS(agent, batch, z, penalty, *others)
        return self.loss(agent, "actor", lambda of: COMPUTE_LOSS(of, batch, z, penalty, *others))

    def loss(self, agent: nn.Module, first: str, loss_of: Callable) -> tuple:
        """The loss, stale if that is asked for, and what of it is logged."""
        if not self.args.stale_gradients:
            return loss_of(agent)
        if self.stale is None or self.stale[0] != first:
            self.stale = first, copy.deepcopy(agent)
        loss = StaleLoss(agent, self.stale[1], first, loss_of)
        return loss, loss.stats

    def imagine(self, agent: nn.Module, z: Tensor, mask: Tensor, action_noise, latent_noise, done_noise, args: Args):
        """As the script's; `learned_dummies`, `lost_dones`."""
        mask = torch.ones_like(mask) if self.args.learned_dummies else mask
        noise, done_model = iter(done_noise), agent.done_model

        def losing(next_z: Tensor) -> Tensor:
            log_odds = done_model(next_z)
            s = (log_odds + next(noise)).sigmoid()
            is_lost = ((1.0 + s) - s).int() == 0  # the sample and its straight-through gradient, as an integer
            return log_odds.masked_fill(is_lost, -torch.inf)

        with mock.patch.object(agent, "done_model", losing if self.args.lost_dones else done_model):
            return IMAGINE(agent, z, mask, action_noise, latent_noise, done_noise, args)


class FinalLimits(Games):
    """Games in which a time limit is an end like any other."""

    def step(self, actions: Tensor) -> tuple:
        obs, rewards, _, is_last, episodes = super().step(actions)
        return obs, rewards, is_last, is_last, episodes


MODEL_LOSS, COMPUTE_LOSS, IMAGINE = script.model_loss, script.compute_loss, script.imagine


def train(args: Args) -> None:
    """As the script does. The run's folder names this file, and has a copy of it."""
    published = Published(args)
    functions = {name: getattr(published, name) for name in ("model_loss", "compute_loss", "imagine")}
    games = FinalLimits if args.final_limits else Games
    with mock.patch.multiple(script, **functions, Games=games, __file__=__file__):
        script.train(args)


if __name__ == "__main__":
    speak_utf8()
    try:
        train(tyro.cli(Args, description=__doc__))
    except (FloatingPointError, OSError) as error:
        sys.exit(f"\nerror: {error}")
