"""The paper's figure 4: `deep_spi_ppo_atari.py` in the corridors of `confounding_gridworld.py`: --n-path 5

It is that script, with its settings, its networks (but one input channel) and its folder; PPO with both coefficients 0.
Rewards are neither scaled nor clipped. The corridors have few states, so that a minibatch encodes each picture once,
and the policy's value is exact: `corridors/value` is V of the initial cell, `corridors/distance` the mean squared
difference of φ at the two '!', as the authors' code has it, after each iteration.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import confounding_gridworld as corridors
import deep_spi_ppo_atari as script
from benchmark.common import speak_utf8
from benchmark.peers import published_norm

ENV_ID = "Corridors-v0"


@dataclass
class Args(script.Args):
    env_id: str = ENV_ID  # these corridors, and nothing else
    total_timesteps: int = 200_000  # agent steps in all, rounded down to whole rollouts
    n_path: int = 5  # n, the length of the two corridors
    epsilon: float = 0.2  # probability of the bottom corridor
    published_norm: bool = False  # the published code's divisor in place of the spectral norm
    learned_dummies: bool = False  # dummy rows count in every loss, with z' <- z, as published

    def __post_init__(self):
        with mock.patch.object(script, "ATARI", [ENV_ID]):
            super().__post_init__()
        self.check("n_path", 2 <= self.n_path <= 81, "must lie in [2, 81]")
        self.check("epsilon", 1e-6 <= self.epsilon < 1, "must lie in [1e-6, 1)")

    @property
    def world(self) -> corridors.Gridworld:
        """The exact MDP, and its pictures."""
        return corridors.make_gridworld(self.n_path, self.epsilon, self.gamma)


class Games:
    """N corridors side by side. A frame has the picture in its first channel, and the state's number in the second."""

    def __init__(self, args: Args, start: int = 0):
        self.world, self.num_actions = args.world, 4
        self.envs = corridors.VectorEnv(self.world, args.num_envs, np.random.default_rng([args.seed, start]))
        states = len(self.world.coords)
        self.frames = np.zeros((states, 84, 84, 4), dtype=np.uint8)
        self.frames[..., 0], self.frames[..., 1] = self.world.pictures[:, 0], np.arange(states)[:, None, None]
        self.is_last = np.zeros(args.num_envs, dtype=bool)
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)

    def reset(self) -> Tensor:
        """First observations (N, 84, 84, 4)."""
        return torch.from_numpy(self.frames[self.envs.states])

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[int, tuple[float, int]]]:
        """As the script's, with the rewards as they are."""
        states, rewards, terminated, truncated = self.envs.step(actions.numpy())
        self.returns += rewards
        self.lengths += ~self.is_last
        self.is_last = terminated | truncated
        ended = np.flatnonzero(self.is_last)
        episodes = {int(i): (float(self.returns[i]), int(self.lengths[i])) for i in ended}
        self.returns[ended], self.lengths[ended] = 0, 0
        others = map(torch.from_numpy, (rewards.astype(np.float32), terminated, self.is_last))
        return torch.from_numpy(self.frames[states]), *others, episodes


class Agent(script.Agent):
    """The script's agent for pictures of one channel, each of which is encoded once."""

    def __init__(self, num_actions: int, n_path: int):
        super().__init__(num_actions)
        self.encoder[0] = script.layer_init(nn.Conv2d(1, 32, 8, stride=4))
        pictures = corridors.make_gridworld(n_path, 0.5, 0.99).pictures  # which depend on the length alone
        self.register_buffer("pictures", torch.from_numpy(pictures).permute(0, 2, 3, 1), persistent=False)

    def encode(self, obs: Tensor) -> Tensor:
        """z = φ(s), (B, height, width, channels), of frames (B, 84, 84, 4), by the state's number in the second."""
        if not hasattr(self, "pictures"):  # while the script's constructor asks for the latent's shape
            return super().encode(obs)
        return super().encode(self.pictures)[obs[:, 0, 0, 1].long()]


class Run(script.Run):
    """The script's run, with the exact value and the distance in its log."""

    def end_iteration(self, metrics: dict[str, float], ratios: Tensor, learned: dict) -> None:
        agent, world = learned["agent"], self.args.world
        with torch.no_grad():
            z = super(Agent, agent).encode(agent.pictures)
            pi = agent.policy_and_value(z)[0].exp().double().cpu().numpy()
        top, bottom = world.critical
        metrics["corridors/distance"] = (z[top] - z[bottom]).square().mean().item()
        metrics["corridors/value"] = float(corridors.value(world.P, world.R, pi, self.args.gamma)[world.start])
        super().end_iteration(metrics, ratios, learned)


LATENTS, COMPUTE_LOSS = script.latents, script.compute_loss


def latents_with_dummies(agent: nn.Module, batch) -> tuple[Tensor, Tensor]:
    """As the script's, but a dummy's z' is its z. The mask that says which they are is still the true one here."""
    z, next_z = LATENTS(agent, batch)
    return z, torch.where(batch.mask.view(-1, *[1] * (z.dim() - 1)) > 0, next_z, z)


def loss_with_dummies(agent: nn.Module, batch, args: Args, noise: Tensor | None) -> tuple:
    """As the script's, over all rows."""
    z, next_z = latents_with_dummies(agent, batch)
    with mock.patch.object(script, "latents", lambda *_: (z, next_z)):
        return COMPUTE_LOSS(agent, batch._replace(mask=torch.ones_like(batch.mask)), args, noise)


def train(args: Args) -> None:
    """As the script does. The run's folder names this file, and has a copy of it."""
    own = {"Games": Games, "Run": Run, "Agent": lambda num_actions: Agent(num_actions, args.n_path)}
    if args.published_norm:
        own["SpectralLayer"] = published_norm.published_layer(script)
    if args.learned_dummies:
        own["compute_loss"] = loss_with_dummies
    with mock.patch.multiple(script, **own, __file__=__file__):
        script.train(args)


if __name__ == "__main__":
    speak_utf8()
    try:
        train(tyro.cli(Args, description=__doc__))
    except (FloatingPointError, OSError) as error:
        sys.exit(f"\nerror: {error}")
