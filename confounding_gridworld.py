# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "envpool==1.2.5", "gymnasium==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "scipy==1.17.1"]
# ///
"""Confounding updates (talk of Delgrange, Avalos and Röpke, ICLR 2026): a gridworld where improvement can be watched.

    python confounding_gridworld.py          # three methods, 3 seeds: 4 to 6 minutes on one core
    python -m benchmark.confounding          # the study: thirteen settings, 10 seeds; docs/results.md has its results

Two corridors look alike up to their last cell, '!'. UP at the top '!' is best, UP at the bottom '!' is a disaster. An
agent sees pictures; if φ merges the two '!', an update that raises UP at one raises it at both: as 1-ε of the episodes
pass the top one, a batch in which UP was tried there alone is all praise. The MDP is known and small, so V^{π_n} of
every policy on the way is exact, and each fall of it counts. Agents with the same networks:

    ppo       loss of the clipped objective min(r A, clip(r, 1 ± ε) A); R̄ and P̄ are not trained
    additive  + α_R L_R + α_P L_P beside it (the placement of DeepMDP)
    deep_spi  U = A - α_R ℓ_R - α_P ℓ_P in place of A: inside the clip (see `compute_loss`)
    gated     the same, but where the clip is active, the losses pull φ no more either

    φ  encoder            R̄  reward_model        ℓ_R  reward_loss        α_R  reward_loss_coef
    z' next_z             P̄  transition_model    ℓ_P  transition_loss    α_P  transition_loss_coef
    U  utility            N^C neighbourhood: 2 - C <= π'(a|s)/π(a|s) <= C, here with C = 1 + ε

Expect a table, and two pictures in runs/confounding_gridworld. V(start) begins at 4.8, where π_b goes RIGHT; the
optimum is 8.01. Which method falls less on the way is the question, and three seeds do not answer it.
The equations are those of `deep_spi_ppo.py`, word for word. The states are few: each is encoded once per update.
"""

import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# ==== 1. Arguments ====================================================================================================

METHODS = {"ppo": "PPO", "additive": "additive", "deep_spi": "Deep SPI"}  # those of the study
NAMES = METHODS | {"gated": "gated"}
COLOURS = {"ppo": "#0072B2", "additive": "#E69F00", "deep_spi": "#009E73", "gated": "#7F3C8D"}  # for colour-blind eyes


@dataclass
class Args:
    # ---- Experiment
    seed: int = 1  # seed of the environments, the networks and every random draw; the first one, if there are several
    num_seeds: int = 3  # runs of each method, with the seeds from `seed` on
    method: Literal["all", "ppo", "additive", "deep_spi", "gated"] = "all"  # the agent; all: but gated, from one start
    out_dir: str = "runs/confounding_gridworld"  # folder of the pictures; those of an earlier call are replaced

    # ---- Environment
    n_path: int = 5  # n, the column of the critical cells: the length of the two corridors
    epsilon: float = 0.2  # probability of the bottom corridor
    start: Literal["fresh", "confounded"] = (
        "confounded"  # untrained networks, or fitted to a policy that hardly goes UP
    )
    start_up: float = 0.002  # probability of UP under that policy: so rare that φ merges the two '!' (else: an error)
    total_timesteps: int = 120_000  # environment steps in all, rounded down to whole rollouts
    num_envs: int = 128  # N, parallel environments: many, for the state coverage that the world model needs
    num_steps: int = 8  # T, steps of each environment per iteration

    # ---- PPO
    learning_rate: float = 1e-3  # Adam's step size, annealed linearly to 0 (published: 2.5e-4)
    gamma: float = 0.99  # γ, discount factor
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over the rollout per iteration
    clip_coef: float = 0.2  # ε of the clip; the neighbourhood's C is 1 + ε (published: 0.1)
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient, over all parameters together

    # ---- Deep SPI
    latent_dim: int = 1  # D, dimensions of z: narrow, so that φ has to choose which states to merge
    reward_loss_coef: float = 0.01  # α_R, weight of the reward loss
    transition_loss_coef: float = 1.568  # α_P, weight of a sum over D: the published 0.0005 for 3136 is 1.568/D

    def __post_init__(self):
        """Refuse what cannot work, in one line. Raises SystemExit(2), as for every usage error."""
        for name in ("num_seeds", "num_envs", "num_steps", "num_minibatches", "update_epochs"):
            self.check(name, getattr(self, name) >= 1, "must be at least 1")
        self.check("gae_lambda", 0 <= self.gae_lambda <= 1, "must lie in [0, 1]")
        self.check("gamma", 0 < self.gamma < 1, "must lie in (0, 1): a policy may stand still for ever")
        for name in ("ent_coef", "vf_coef", "reward_loss_coef", "transition_loss_coef"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "must be finite and not negative")
        for name in ("learning_rate", "max_grad_norm"):
            self.check(name, 0 < getattr(self, name) < math.inf, "must be finite and positive")
        self.check("clip_coef", 0 < self.clip_coef < 1, "must lie in (0, 1), so that 1 < C < 2")
        rule = "the last of num_seeds seeds must lie in [0, 2^32)"
        self.check("seed", 0 <= self.seed <= 2**32 - self.num_seeds, rule)
        rule = (
            "must lie in [2, 81]: at 1 the state F would lie on '@', and a picture has 84 columns for n_path + 3 cells"
        )
        self.check("n_path", 2 <= self.n_path <= 81, rule)
        self.check("epsilon", 0 < self.epsilon < 1, "must lie in (0, 1)")
        self.check("epsilon", self.epsilon >= 1e-6, "too small: the reward at F grows as 1/epsilon")
        rule = "too small: the rewards for UP grow as 1/gamma^n_path, here by more than a million"
        self.check("gamma", self.n_path * math.log(self.gamma) > -math.log(1e6), rule)
        self.check("start_up", 0 < self.start_up <= 0.5, "must lie in (0, 0.5]")
        used = self.start == "confounded" or self.start_up == Args.start_up
        self.check("start_up", used, "leave it out: a fresh start is fitted to no policy")
        self.check("latent_dim", 1 <= self.latent_dim <= 512, "must lie in [1, 512]")
        rollout = self.num_envs * self.num_steps
        self.check("total_timesteps", self.total_timesteps >= rollout, f"must be at least one rollout, {rollout}")
        rule = f"must divide the rollout's {rollout} steps (num_envs x num_steps)"
        self.check("num_minibatches", rollout % self.num_minibatches == 0, rule)

    def check(self, name: str, allowed: object, rule: str) -> None:
        """Exit with one line on stderr unless the field is allowed."""
        if not allowed:
            print(f"error: --{name.replace('_', '-')}: got {getattr(self, name)!r}; {rule}", file=sys.stderr)
            raise SystemExit(2)

    @property
    def loss_placement(self) -> str:
        """Where the world model's losses go, as `deep_spi_ppo.py` has it."""
        return {"additive": "additive", "gated": "gated"}.get(self.method, "utility")


# ==== 2. Environment ==================================================================================================
# S states, numbered row by row over the cells that are not walls; A = 4 actions.

UP, DOWN, LEFT, RIGHT = range(4)
TIME_LIMIT = 200
INTENSITY = {"#": 50, ">": 100, "!": 100, "I": 120, "@": 180, "W": 200, "G": 220, "F": 220, "agent": 255}


class Gridworld(NamedTuple):
    """The exact MDP, and what the agent sees of it."""

    P: np.ndarray  # (S, A, S)
    R: np.ndarray  # (S, A)
    coords: np.ndarray  # (S, 2) row and column
    symbols: np.ndarray  # (S,)
    is_terminal: np.ndarray  # (S,)
    start: int
    critical: tuple[int, int]  # top '!', bottom '!'
    intensity: np.ndarray  # (5, n_path + 3) uint8
    pictures: np.ndarray  # (S, 1, 84, 84) uint8


def make_gridworld(n_path: int, epsilon: float, gamma: float) -> Gridworld:
    """The two corridors of length n = n_path.

    From I, RIGHT leads to '@'; from there any action to the top corridor with 1-ε, else to the bottom one. RIGHT moves
    on for a reward of 1, at '!' to the end W. UP at '!' ends too: at the top in G for n/γⁿ, more than the whole
    corridor's worth; at the bottom in F for -(2-ε)n/(εγⁿ), so that UP at both costs all that RIGHT would bring and
    more. Every other action stays, for 0. Terminal states lead to themselves.
    """
    n = n_path
    cells = np.full((5, n + 3), "#")
    cells[2, :2] = "I", "@"
    cells[[1, 3], 1:n] = ">"
    cells[[1, 3], n], cells[[1, 3], n + 1] = "!", "W"
    cells[0, n], cells[2, n] = "G", "F"
    coords = np.argwhere(cells != "#")
    symbols = cells[tuple(coords.T)]
    is_terminal = np.isin(symbols, ("W", "G", "F"))
    number = {tuple(cell): s for s, cell in enumerate(coords.tolist())}

    S = len(coords)
    P = np.tile(np.eye(S)[:, None], (1, 4, 1))  # every action stays
    R = np.zeros((S, 4))

    def move(s: int, action: int, arrival: tuple[int, int], reward: float) -> None:
        P[s, action], R[s, action] = np.eye(S)[number[arrival]], reward

    move(number[2, 0], RIGHT, (2, 1), 0.0)
    P[number[2, 1]] = (1 - epsilon) * np.eye(S)[number[1, 1]] + epsilon * np.eye(S)[number[3, 1]]
    for row in (1, 3):
        for column in range(1, n + 1):
            move(number[row, column], RIGHT, (row, column + 1), 1.0)
    move(number[1, n], UP, (0, n), n / gamma**n)
    move(number[3, n], UP, (2, n), -(2 - epsilon) * n / (epsilon * gamma**n))

    intensity = np.vectorize(INTENSITY.get)(cells).astype(np.uint8)
    grids = np.tile(intensity, (S, 1, 1))
    grids[range(S), *coords.T] = INTENSITY["agent"]
    rows, columns = (((np.arange(84) + 0.5) * size / 84).astype(int) for size in cells.shape)  # the cell at a pixel
    pictures = grids[:, rows[:, None], columns][:, None]
    critical = (number[1, n], number[3, n])
    return Gridworld(P, R, coords, symbols, is_terminal, number[2, 0], critical, intensity, pictures)


class VectorEnv:
    """N gridworlds side by side. As in EnvPool, an ended episode shows its last state, and the next step resets it."""

    def __init__(self, world: Gridworld, num_envs: int, rng: np.random.Generator):
        self.world, self.rng = world, rng
        self.cumulative = world.P.cumsum(-1)
        self.states = np.full(num_envs, world.start)
        self.lengths = np.zeros(num_envs, dtype=int)
        self.done = np.zeros(num_envs, dtype=bool)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Next states, rewards, terminated and truncated, each (N,). Where an episode is over, all but a reset is 0."""
        reset, before = self.done, self.states
        draw = self.rng.random(len(actions))[:, None] * self.cumulative[before, actions, -1:]
        after = (draw >= self.cumulative[before, actions]).sum(-1)
        self.states = np.where(reset, self.world.start, after)
        self.lengths = np.where(reset, 0, self.lengths + 1)
        rewards = np.where(reset, 0.0, self.world.R[before, actions])
        terminated = self.world.is_terminal[self.states]
        truncated = (self.lengths >= TIME_LIMIT) & ~terminated
        self.done = terminated | truncated
        return self.states, rewards, terminated, truncated


def value(P: np.ndarray, R: np.ndarray, pi: np.ndarray, gamma: float) -> np.ndarray:
    """V^π = (I - γ P_π)^-1 R_π, shape (..., S), by one linear solve."""
    P_pi = np.einsum("...sa,...sat->...st", pi, P)
    return np.linalg.solve(np.eye(P.shape[-1]) - gamma * P_pi, (pi * R).sum(-1)[..., None])[..., 0]


def state_visits(world: Gridworld, pi: np.ndarray, gamma: float) -> np.ndarray:
    """Share of an episode's discounted steps that π spends in each state, (S,); 0 in the terminal states."""
    P_pi = np.einsum("sa,sat->st", pi, world.P)
    visits = np.linalg.solve(np.eye(len(P_pi)) - gamma * P_pi.T, np.eye(len(P_pi))[world.start]) * ~world.is_terminal
    return visits / visits.sum()


# ==== 3. Networks =====================================================================================================
# B rows, A actions, D latent dimensions. φ, actor and critic are Atari's, on one frame in place of four; φ ends in a
# linear bottleneck. The world model has the sizes of `deep_spi_ppo.py`.


def layer_init(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """Orthogonal weights of this gain, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def group_sort(x: Tensor) -> Tensor:
    """GroupSort(2): sort neighbouring pairs along dimension 1, ascending. Gradient norm 1 where ReLU's may be 0."""
    first, second = x.unflatten(1, (-1, 2)).unbind(2)
    swap = F.relu(first - second)  # min and max, but for rounding; torch's own have slow gradients
    return torch.stack((first - swap, second + swap), dim=2).flatten(1, 2)


def exact_spectral_norm(matrix: Tensor) -> Tensor:
    """Largest singular value σ of each matrix (G, m, n), to float32 precision; shape (G,).

    Power iteration on the smaller Gram matrix, 2^12 steps of it by squaring 12 times: no state between calls, and no
    eigensolver, which would make CUDA wait. With u, v held fixed, σ = uᵀWv has the gradient uvᵀ, which is that of σ.
    """
    wide = matrix.shape[-2] < matrix.shape[-1]
    with torch.no_grad():
        power = matrix @ matrix.mT if wide else matrix.mT @ matrix
        for _ in range(6):  # a norm after every second squaring keeps float32 from underflowing
            power = power / torch.linalg.matrix_norm(power, keepdim=True)
            power = power @ power
            power = power @ power
        largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]  # a column surely not orthogonal to v
        top = F.normalize(power.take_along_dim(largest, dim=-1), dim=-2)
        u = top if wide else F.normalize(matrix @ top, dim=-2)
        v = F.normalize(matrix.mT @ top, dim=-2) if wide else top
    return (u.mT @ matrix @ v).flatten()


class SpectralLinear(nn.Linear):
    """A linear layer of spectral norm 1, so 1-Lipschitz: W/σ and a bias. LeCun-normal weights, zero biases."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator):
        nn.Module.__init__(self)  # without Linear's own initialisation, which would draw from the common stream
        std = math.sqrt(1 / inputs) / 0.87962566  # LeCun normal: the divisor makes up for the tails cut at 2 std
        weight = nn.init.trunc_normal_(
            torch.empty(outputs, inputs), std=std, a=-2 * std, b=2 * std, generator=generator
        )
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) → (B, outputs)."""
        return F.linear(x, self.weight / exact_spectral_norm(self.weight[None]), self.bias)


class RewardModel(nn.Module):
    """R̄(z, a): a 1-Lipschitz network with one output per action."""

    def __init__(self, latent_dim: int, num_actions: int, generator: torch.Generator):
        super().__init__()
        self.hidden1 = SpectralLinear(latent_dim, 64, generator)
        self.hidden2 = SpectralLinear(64, 64, generator)
        self.output = SpectralLinear(64, num_actions, generator)

    def forward(self, z: Tensor, actions: Tensor) -> Tensor:
        """Predicted reward (B,) of latents z (B, D) and actions (B,)."""
        x = group_sort(self.hidden2(group_sort(self.hidden1(z))))
        return self.output(x).gather(-1, actions[:, None]).squeeze(-1)


class TransitionModel(nn.Module):
    """P̄(·|z, a): a mixture of K = 5 diagonal normals over the next latent, from Lipschitz networks."""

    def __init__(self, latent_dim: int, num_actions: int, generator: torch.Generator):
        super().__init__()
        self.shape = (latent_dim, 5, 2, num_actions)  # latent dimensions, K components, [loc, scale], actions
        self.hidden = SpectralLinear(latent_dim, 64, generator)
        self.components = SpectralLinear(64, math.prod(self.shape), generator)
        self.mixture = SpectralLinear(64, 5 * num_actions, generator)

    def forward(self, z: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """One reparameterised sample z̄' of P̄(·|z, a), shape (B, D).

        `noise` is standard normal, (B, D, K); z̄' = Σ_k w_k (loc_k + scale_k clip(noise_k, -1, 1)):
        the published sample averages over the components, where a mixture's own would draw one of them.
        """
        hidden = group_sort(self.hidden(z))
        rows = torch.arange(len(z))
        loc, scale = self.components(hidden).unflatten(-1, self.shape)[rows, ..., actions].unbind(-1)  # (B, D, K)
        weights = self.mixture(hidden).unflatten(-1, (5, -1))[rows, :, actions].softmax(-1)  # (B, K)
        samples = 0.5 * loc + 0.5 * (F.softplus(scale) + 1e-6) * noise.clamp(-1, 1)
        return (samples @ weights[:, :, None]).squeeze(-1)


class Agent(nn.Module):
    """π = π̄∘φ and its critic, with the world model (R̄, P̄) that reads the same latent."""

    def __init__(self, num_actions: int, latent_dim: int, generator: torch.Generator):
        super().__init__()
        self.encoder = nn.Sequential(
            layer_init(nn.Conv2d(1, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(7 * 7 * 64, latent_dim), gain=1.0),
        )
        self.reward_model = RewardModel(latent_dim, num_actions, generator)
        self.transition_model = TransitionModel(latent_dim, num_actions, generator)
        self.fc = layer_init(nn.Linear(latent_dim, 512))
        self.actor = layer_init(nn.Linear(512, num_actions), gain=0.01)
        self.critic = layer_init(nn.Linear(512, 1), gain=1.0)

    def encode(self, obs: Tensor) -> Tensor:
        """z = φ(s), (B, D), of pictures (B, 1, 84, 84) uint8."""
        return self.encoder(obs.to(self.fc.weight.dtype) / 255)

    def policy_and_value(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, A) of every action, and the value (B,), of latents z."""
        hidden = F.relu(self.fc(z))
        return self.actor(hidden).log_softmax(-1), self.critic(hidden).squeeze(-1)


# ==== 4. Equations ====================================================================================================
# T steps, N environments, M rows of a minibatch, A actions. A row is a transition (s, a, s'). Where s is already the
# last of an episode the row is an auto-reset dummy, not a transition: its mask is 0 and it counts nowhere.


class Transitions(NamedTuple):
    """M transitions, their states apart: each picture is encoded once. A whole rollout has (T, N) for (M,)."""

    actions: Tensor  # (M,) int64
    rewards: Tensor  # (M,) clipped or scaled: those the advantages are made of
    old_log_probs: Tensor  # (M, A) ln π_old of every action
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,) the value function's target
    mask: Tensor  # (M,) 1 real, 0 dummy


def compute_gae(
    rewards: Tensor, values: Tensor, is_terminal: Tensor, is_last: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, both (T, N) (Schulman et al., 2016, eq. 16).

    rewards (T, N); values, is_terminal, is_last (T+1, N) of obs[0..T]. A terminal state has value 0. Sums stop at the
    last state of an episode. At a time limit it is last but not terminal: its value is bootstrapped.
    """
    assert values.shape == is_terminal.shape == is_last.shape == (len(rewards) + 1, *rewards.shape[1:])
    deltas = rewards + gamma * values[1:] * ~is_terminal[1:] - values[:-1]  # (T, N)
    advantages = torch.zeros_like(values)  # the last row stays 0
    for t in reversed(range(len(rewards))):
        advantages[t] = deltas[t] + gamma * gae_lambda * ~is_last[t + 1] * advantages[t + 1]
    return advantages[:-1], advantages[:-1] + values[:-1]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (M,) or (T, N) over the rows whose mask is 1; 0 if there are none."""
    assert x.shape == mask.shape
    return (x * mask).sum() / mask.sum().clamp(min=1)


def normalize(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and (population) standard deviation 1 over the real rows of the minibatch."""
    centred = advantages - masked_mean(advantages, mask)
    return centred / (masked_mean(centred.square(), mask).sqrt() + 1e-8)


def reward_loss(predicted_rewards: Tensor, rewards: Tensor) -> Tensor:
    """ℓ_R(s,a) = |R(s,a) - R̄(φ(s),a)|, as smooth-L1 (published), per transition: (M,)."""
    return F.smooth_l1_loss(predicted_rewards, rewards, reduction="none")


def transition_loss(predicted_next_z: Tensor, next_z: Tensor) -> Tensor:
    """ℓ_P(s,a,s') = d̄(z', z̄'), z̄' ~ P̄(·|z,a): smooth-L1, summed over the latent, per transition: (M,).

    The talk bounds its Wasserstein distance by E d̄(z', z̄'); smooth-L1 for d̄ and the sum are published: α_P depends on
    the latent's size and scale. z' is not detached: φ too is to make the next latent predictable.
    """
    return F.smooth_l1_loss(predicted_next_z.float(), next_z.float(), reduction="none").flatten(1).sum(-1)


def clipped_objective(ratio: Tensor, utility: Tensor, clip_coef: float) -> Tensor:
    """min(r U, clip(r, 1 ± ε) U), per transition: (M,). Gradient flows through r, and through U if it has one."""
    return torch.min(ratio * utility, ratio.clamp(1 - clip_coef, 1 + clip_coef) * utility)


def compute_loss(
    agent: Agent, batch: Transitions, z: Tensor, next_z: Tensor | None, noise: Tensor | None, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a minibatch, and what of it is logged, as scalars.

    z, next_z: φ(s) and φ(s') of the M transitions, neither detached; noise: see `TransitionModel.forward`. Without
    next_z the world model is not run, and this is PPO.
    """
    log_probs, values = agent.policy_and_value(z)  # (M, A), (M,)
    log_ratios = log_probs - batch.old_log_probs  # (M, A)
    log_ratio = log_ratios.gather(-1, batch.actions[:, None]).squeeze(-1)  # (M,)
    ratio = log_ratio.exp()

    advantages = normalize(batch.advantages, batch.mask)  # of A, not of the losses
    utility, additive_loss, world_model_stats = advantages, 0.0, {}
    if next_z is not None:
        l_r = reward_loss(agent.reward_model(z, batch.actions), batch.rewards)  # (M,)
        l_p = transition_loss(agent.transition_model(z, batch.actions, noise), next_z)  # (M,)
        penalty = args.reward_loss_coef * l_r + args.transition_loss_coef * l_p
        utility = advantages - penalty  # U = A - α_R ℓ_R - α_P ℓ_P
        if args.loss_placement == "additive":  # "Let's just add L_R, L_P to the loss? No, we can't!"
            utility, additive_loss = advantages, masked_mean(penalty, batch.mask)
        if args.loss_placement == "gated":  # in a row where the clip is active, the losses pull no more either
            is_clipped = clipped_objective(ratio, utility, args.clip_coef) < ratio * utility
            utility = torch.where(is_clipped, utility.detach(), utility)
        world_model_stats = {
            "world_model/reward_loss": masked_mean(l_r, batch.mask),
            "world_model/transition_loss": masked_mean(l_p, batch.mask),
            "spi/penalty_mean": masked_mean(penalty, batch.mask),
        }

    policy_loss = -masked_mean(clipped_objective(ratio, utility, args.clip_coef), batch.mask)
    value_loss = 0.5 * masked_mean((values - batch.returns).square(), batch.mask)
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), batch.mask)
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss + additive_loss

    ratios = torch.where(batch.mask[:, None] > 0, log_ratios.exp(), 1.0)  # of every action; 1 in dummies
    outside = (ratios > 1 + args.clip_coef) | (ratios < 1 - args.clip_coef)  # of N^C with C = 1 + ε
    stats = {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": masked_mean(ratio - 1 - log_ratio, batch.mask),
        "losses/clipfrac": masked_mean(((ratio - 1).abs() > args.clip_coef).float(), batch.mask),
        **world_model_stats,
        "spi/ratio_min": ratios.min(),
        "spi/ratio_max": ratios.max(),
        "spi/outside_neighbourhood": masked_mean(outside.float().mean(-1), batch.mask),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


class History(NamedTuple):
    """What a run was before and after each of its n iterations."""

    V: np.ndarray  # (n + 1, S) exact V^{π_n}
    pi: np.ndarray  # (n + 1, S, A)
    distance: np.ndarray  # (n + 1,) `critical_distance`
    penalty: np.ndarray  # (n,) mean of α_R ℓ_R + α_P ℓ_P, where A has standard deviation 1; nan for PPO


def total_decrease(V: np.ndarray) -> float:
    """Σ_n max(0, V_n - V_{n+1}) of values V (iterations + 1,): 0 if and only if V never fell."""
    return np.maximum(0, V[:-1] - V[1:]).sum()


def largest_drawdown(V: np.ndarray) -> float:
    """max over n < m of V_n - V_m, or 0 if V never falls: how far a user may be thrown back."""
    return (np.maximum.accumulate(V) - V).max()


def outside_neighbourhood(log_pi: Tensor, new_log_pi: Tensor, clip_coef: float) -> np.ndarray:
    """Share of the A ratios π_{n+1}(a|s)/π_n(a|s) that an iteration moved out of N^C, C = 1 + ε, by state: (S,)."""
    ratios = (new_log_pi - log_pi).double().exp()
    return ((ratios > 1 + clip_coef) | (ratios < 1 - clip_coef)).double().mean(-1).numpy()


def critical_distance(z: Tensor, world: Gridworld) -> float:
    """|φ(top '!') - φ(bottom '!')| over the mean distance of two states that are not terminal; nan if that is 0."""
    top, bottom = world.critical
    return ((z[top] - z[bottom]).norm() / F.pdist(z[~torch.from_numpy(world.is_terminal)]).mean()).item()


# ==== 5. Training =====================================================================================================

FIT_STEPS = 300


class RunFailed(Exception):
    """A run that cannot go on; its message is the one line to print."""


def start_policy(args: Args, num_states: int) -> np.ndarray:
    """π_b of the confounded start, (S, A): UP with `start_up`, DOWN and LEFT with 0.001, else RIGHT, everywhere."""
    return np.tile([args.start_up, 0.001, 0.001, 0.998 - args.start_up], (num_states, 1))


def fit_to_start_policy(agent: Agent, world: Gridworld, args: Args) -> None:
    """Train φ, actor, critic, R̄ and P̄ on the data of π_b until φ merges the two '!'. Raises RunFailed if it does not.

    Every (s, a, s') counts with its exact share of π_b's discounted steps: what π_b hardly ever does hardly ever
    counts. V_b tells the columns of a corridor apart, but not top from bottom; ℓ_P pulls together the two corridors,
    since from '@' it cannot be predicted which one comes; UP at the two '!' would tell them apart, were it not so rare.
    No method has a part in this: all three start from the same weights. π_b is the same in all states, so the actor
    begins at it. P̄ is fitted in its mean only: its scales stay as they were drawn, and the runs have yet to learn them.
    """
    pi_b, R = start_policy(args, len(world.P)), world.R / args.n_path
    V_b, visits = value(world.P, R, pi_b, args.gamma), state_visits(world, pi_b, args.gamma)
    weights = visits[:, None, None] * pi_b[..., None] * world.P  # (S, A, S) share of each transition
    s, a, next_s = torch.from_numpy(weights).nonzero(as_tuple=True)
    pi_b, R, V_b, visits, weights = (torch.from_numpy(x).float() for x in (pi_b, R, V_b, visits, weights))
    pictures = torch.from_numpy(world.pictures)
    no_noise = torch.zeros((len(s), args.latent_dim, 5))  # P̄'s mean: its noise would outshout the latents' distances
    agent.actor.bias.data = pi_b[0].log()
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    for step in range(FIT_STEPS):
        optimizer.param_groups[0]["lr"] = (1 - step / FIT_STEPS) * 2e-3
        z = agent.encode(pictures)
        log_probs, values = agent.policy_and_value(z)
        l_r = reward_loss(agent.reward_model(z[s], a), R[s, a])
        l_p = transition_loss(agent.transition_model(z[s], a, no_noise), z[next_s])
        cross_entropy = -(visits * (pi_b * log_probs).sum(-1)).sum()
        value_loss = 0.5 * (visits * (values - V_b).square()).sum()
        optimizer.zero_grad()
        # The value loss weighs more, lest ℓ_P, smallest where φ is constant, merge everything.
        (cross_entropy + 5 * value_loss + (weights[s, a, next_s] * (l_r + l_p)).sum()).backward()
        optimizer.step()
    z, log_pi, state_values = evaluate(agent, pictures)
    policy_error = ((log_pi - pi_b.log()).abs() * (visits > 0)[:, None]).max().item()
    spread = (visits * (V_b - (visits * V_b).sum()).square()).sum()
    unexplained = ((visits * (state_values - V_b).square()).sum() / spread).item()
    distance = critical_distance(z, world)
    if not (policy_error < 0.1 and unexplained < 0.1 and distance < 0.2):
        errors = f"ln π is off by {policy_error:.2f}, {unexplained:.2f} of V's variance is unexplained"
        errors += f", relative distance of the critical states {distance:.2f} (allowed: 0.1, 0.1, 0.2)"
        raise RunFailed(f"{FIT_STEPS} steps did not fit the confounded start: {errors}")


def make_agent(args: Args, world: Gridworld) -> tuple[Agent, torch.Generator]:
    """The agent at the start of a run, the same for every method, and the stream of its world model's noise."""
    torch.manual_seed(args.seed)
    # The world model draws from generators of its own, so that the rest of the agent is PPO's to the last bit.
    init_seed, noise_seed = np.random.SeedSequence([args.seed, 1]).generate_state(2).tolist()
    agent = Agent(world.R.shape[1], args.latent_dim, torch.Generator().manual_seed(init_seed))
    noise_rng = torch.Generator().manual_seed(noise_seed)
    if args.start == "confounded":
        fit_to_start_policy(agent, world, args)
    return agent, noise_rng


def encode_once(agent: Agent, pictures: Tensor, *states: Tensor) -> list[Tensor]:
    """φ of each batch of states (M,): the S distinct pictures are encoded once, and every row takes its state's z."""
    all_z = agent.encode(pictures)  # (S, D)
    return [all_z[s] for s in states]


@torch.no_grad()
def evaluate(agent: Agent, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z (S, D), ln π(a|s) (S, A) and the critic's value (S,) of every state. Raises RunFailed if π is not finite."""
    z = agent.encode(pictures)
    log_pi, state_values = agent.policy_and_value(z)
    if not log_pi.isfinite().all():
        raise RunFailed("the policy is not finite")
    return z, log_pi, state_values


def train(args: Args) -> tuple[dict[str, float], History]:
    """One run: its metrics and its history. Raises RunFailed."""
    start_time = time.perf_counter()
    T, N = args.num_steps, args.num_envs
    num_iterations = args.total_timesteps // (T * N)
    run_world_model = args.method != "ppo" and (args.reward_loss_coef > 0 or args.transition_loss_coef > 0)

    world = make_gridworld(args.n_path, args.epsilon, args.gamma)
    agent, noise_rng = make_agent(args, world)
    envs = VectorEnv(world, N, np.random.default_rng([args.seed, 2]))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    pictures = torch.from_numpy(world.pictures)
    states = torch.full((T + 1, N), world.start)
    actions = torch.zeros((T, N), dtype=torch.int64)
    rewards = torch.zeros((T, N))
    is_terminal, is_last = torch.zeros((2, T + 1, N), dtype=torch.bool)  # states[t] has value 0; ends an episode

    z, log_pi, state_values = evaluate(agent, pictures)
    pi, distance = [log_pi.double().exp().numpy()], [critical_distance(z, world)]
    outside, penalty = [], []

    for iteration in range(num_iterations):
        # ---- Rollout
        optimizer.param_groups[0]["lr"] = (1 - iteration / num_iterations) * args.learning_rate
        states[0], is_last[0] = states[T], is_last[T]
        for t in range(T):
            actions[t] = torch.multinomial(log_pi.exp()[states[t]], num_samples=1).squeeze(-1)
            next_states, reward, ended, truncated = envs.step(actions[t].numpy())
            states[t + 1] = torch.from_numpy(next_states)  # the true s', even where an episode ends
            rewards[t] = torch.from_numpy(reward / args.n_path)  # going RIGHT to the end brings 1
            is_terminal[t + 1] = torch.from_numpy(ended)  # not by the time limit
            is_last[t + 1] = torch.from_numpy(ended | truncated)

        # ---- Advantages
        mask = (~is_last[:T]).float()  # (T, N)
        values = state_values[states]  # (T + 1, N)
        advantages, returns = compute_gae(rewards, values, is_terminal, is_last, args.gamma, args.gae_lambda)
        rollout = Transitions(actions, rewards, log_pi[states[:T]], advantages, returns, mask)

        # ---- Update
        minibatch_stats = []
        for _ in range(args.update_epochs):
            for rows in torch.randperm(T * N).chunk(args.num_minibatches):
                t, n = rows // N, rows % N
                batch = Transitions(*(x[t, n] for x in rollout))
                z, next_z = encode_once(agent, pictures, states[t, n], states[t + 1, n])
                noise = torch.randn((*z.shape, 5), generator=noise_rng) if run_world_model else None
                next_z = next_z if run_world_model else None
                loss, stats = compute_loss(agent, batch, z, next_z, noise, args)
                optimizer.zero_grad()
                loss.backward()
                stats["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                minibatch_stats.append(torch.stack(list(stats.values())))

        # ---- Logging
        table = torch.stack(minibatch_stats)  # (minibatches, stats)
        finite = table.isfinite().all(0)
        if not finite.all():
            terms = ", ".join(name for name, fine in zip(stats, finite, strict=True) if not fine)
            raise RunFailed(f"stopped at step {(iteration + 1) * T * N}: not finite: {terms}")
        penalty.append(dict(zip(stats, table.mean(0).tolist(), strict=True)).get("spi/penalty_mean", math.nan))
        old_log_pi = log_pi
        z, log_pi, state_values = evaluate(agent, pictures)
        pi.append(log_pi.double().exp().numpy())
        distance.append(critical_distance(z, world))
        outside.append(outside_neighbourhood(old_log_pi, log_pi, args.clip_coef)[~world.is_terminal].mean())

    V = value(world.P, world.R, np.stack(pi), args.gamma)
    V_start = V[:, world.start]
    metrics = {
        "total_decrease": total_decrease(V_start),
        "largest_drawdown": largest_drawdown(V_start),
        "start_value": V_start[0],
        "final_value": V_start[-1],
        "outside_neighbourhood": np.mean(outside),  # of all actions in the states where π acts
        "distance_start": distance[0],
        "distance_end": distance[-1],
        "seconds": time.perf_counter() - start_time,
    }
    history = History(V, np.stack(pi), np.array(distance), np.array(penalty))
    return {name: float(number) for name, number in metrics.items()}, history


# ==== 6. Comparison ===================================================================================================
# runs[method][seed] is a run: its metrics, and V_start (iterations + 1,) at `steps`.

METRICS = {  # columns of the summary
    "total_decrease": "total decrease",
    "largest_drawdown": "largest drawdown",
    "final_value": "final V",
    "outside_neighbourhood": "outside N^C",
    "distance_start": "relative critical distance, start",
    "distance_end": "relative critical distance, end",
}


def mean_interval(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean over runs by Student's t, x (runs, ...) → low, high (...); nan for one run."""
    n = len(x)
    half = scipy.stats.t.ppf(0.975, n - 1) * x.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.nan
    return x.mean(0) - half, x.mean(0) + half


def summary_row(name: str, runs: np.ndarray) -> str:
    """Line of a Markdown table: mean and interval of each metric, runs (runs, metrics)."""
    cells = [f"{mean:.2f} [{a:.2f}, {b:.2f}]" for mean, a, b in zip(runs.mean(0), *mean_interval(runs), strict=True)]
    return " | ".join((f"| {name}", str(len(runs)), *cells)).replace(" [nan, nan]", "") + " |\n"


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture and forget it."""
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")


def draw_gridworld(world: Gridworld, path: Path) -> None:
    """The map with the rewards at the two critical states, and what the agent sees in them."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), width_ratios=(2, 1, 1))
    axes[0].imshow(world.intensity, cmap="gray", vmin=0, vmax=255)
    for (row, column), symbol in zip(world.coords, world.symbols, strict=True):
        axes[0].text(column, row, symbol, ha="center", va="center", fontsize=13)
    for s, name, colour, shift in zip(world.critical, ("top", "bottom"), ("#0072B2", "#D55E00"), (-1, 1), strict=True):
        row, column = world.coords[s]
        axes[0].add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=colour, lw=3))
        words = f"{name} '!': UP {world.R[s, UP]:+.2f}, RIGHT {world.R[s, RIGHT]:+.0f}"
        axes[0].text(0.4, row + shift, words, color="white", va="center", fontsize=11)
        axis = axes[1 if name == "top" else 2]
        axis.imshow(world.pictures[s, 0], cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"what the agent sees at the {name} '!'", fontsize=11)
    axes[0].set_title(f"From '@' to the top with 1−ε, to the bottom with ε; n = {world.coords[world.critical[0], 1]}")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    save(figure, path)


def draw_values(axis: plt.Axes, runs: dict[str, dict[int, dict]]) -> None:
    """V(start) over steps: each run thin, the mean of each method thick, its interval shaded."""
    for method in filter(runs.get, NAMES):
        steps = next(iter(runs[method].values()))["steps"]
        curves = np.stack([run["V_start"] for run in runs[method].values()])
        axis.plot(steps, curves.T, color=COLOURS[method], lw=0.6, alpha=0.5)
        axis.plot(steps, curves.mean(0), color=COLOURS[method], lw=2.5, label=f"{NAMES[method]}, {len(curves)} runs")
        axis.fill_between(steps, *mean_interval(curves), color=COLOURS[method], alpha=0.2, lw=0)
    axis.set(xlabel="environment steps", ylabel=r"exact $V^{\pi_n}$(start)")
    axis.legend(loc="lower right", fontsize=9)


def main(args: Args) -> None:
    """Every method with every seed, then their table and pictures. If a run fails, it is named, and exit code is 1."""
    out_dir = Path(args.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        args.check("out_dir", False, f"must be a folder that can be made: {error.strerror}")
    args.check("out_dir", os.access(out_dir, os.W_OK), "must be writable")
    torch.set_num_threads(1)  # bits depend on it, and small networks gain little from a second
    world, runs, failed = make_gridworld(args.n_path, args.epsilon, args.gamma), {}, False
    for seed in range(args.seed, args.seed + args.num_seeds):
        for method in METHODS if args.method == "all" else (args.method,):
            try:
                metrics, history = train(replace(args, seed=seed, method=method))
            except RunFailed as error:
                print(f"error: {NAMES[method]}, seed {seed}: {error}", file=sys.stderr)
                failed = True
                continue
            steps = np.arange(len(history.V)) * args.num_envs * args.num_steps
            runs.setdefault(method, {})[seed] = metrics | {"steps": steps, "V_start": history.V[:, world.start]}
            numbers = f"largest drawdown {metrics['largest_drawdown']:.2f}, final V {metrics['final_value']:.2f}"
            print(f"{NAMES[method]}, seed {seed}: {numbers}, {metrics['seconds']:.0f} s", flush=True)

    if not runs:
        raise SystemExit(1)
    figure, axis = plt.subplots(figsize=(9, 4.6))
    draw_values(axis, runs)
    save(figure, out_dir / "values.png")
    draw_gridworld(world, out_dir / "gridworld.png")
    print(f"\nMeans with 95 % intervals over seeds\n\n| method | runs | {' | '.join(METRICS.values())} |")
    print("|---|--:|" + "---|" * len(METRICS))
    for method, of_method in runs.items():
        table = np.array([[run[metric] for metric in METRICS] for run in of_method.values()])
        print(summary_row(NAMES[method], table), end="")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
