# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "envpool==1.2.5", "gymnasium==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "scipy==1.17.1"]
# ///
"""Deep SPI with continuous actions: safe policy improvement via world models (Delgrange, Avalos, Röpke, ICLR 2026).

    python deep_spi_ppo_continuous.py                                 # Hopper-v4, 25 minutes: docs/results.md
    python deep_spi_ppo_continuous.py --env-id Pendulum-v1 --total-timesteps 200704

A policy π = π̄∘φ acts on a learned latent z = φ(s). A world model (R̄, P̄) is learned on φ beside it, and its losses
stand inside PPO's clipped objective, where the advantage stood alone. That is the whole method:

    U(s,a,s') = A(s,a) - α_R ℓ_R(s,a) - α_P ℓ_P(s,a,s')
    J         = E[ min( r U, clip(r, 1 ± ε) U ) ],       r = π_new(a|s) / π_old(a|s), of densities

    φ  encoder            R̄  reward_model        ℓ_R  reward_loss        α_R  reward_loss_coef
    z' next_z             P̄  transition_model    ℓ_P  transition_loss    α_P  transition_loss_coef
    U  utility            N^C neighbourhood: 2 - C <= π'(a|s)/π(a|s) <= C, here with C = 1 + ε; see share_outside

The clip stops the pull of the advantage at the edge of the neighbourhood. The losses go on pulling φ, reweighted by r
or by 1 ± ε; and what the model cannot predict has less utility. For any EnvPool environment whose actions are a box and
whose observations are an array of floats. Diff me against `deep_spi_ppo.py`, the same algorithm with discrete actions.
With both coefficients 0 this is PPO with CleanRL's networks and most of its settings: a normal policy of one deviation
for all states, a critic with layers of its own, observations and rewards normalised (here once an iteration, over all
environments). The value loss is not clipped, and time limits are bootstrapped.
"""

import difflib
import fcntl
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import envpool
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ==== 1. Arguments ====================================================================================================

MAY_CHANGE = ("run_dir", "checkpoint_interval", "track", "total_timesteps")  # when a run goes on


@dataclass
class Args:
    # ---- Experiment
    seed: int = 1  # seed of the environments, the networks and every random draw
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where the networks live
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks; weights stay fp32
    run_dir: str = ""  # the run's folder; a run stopped there goes on (default: runs/<env>__<script>__<seed>__<time>)
    checkpoint_interval: int = 100  # iterations from one checkpoint to the next
    track: bool = False  # also log to Weights & Biases (pip install wandb; WANDB_PROJECT and WANDB_ENTITY say where)

    # ---- Environment
    env_id: str = "Hopper-v4"  # EnvPool id of an environment with continuous actions and no pixels
    total_timesteps: int = 1_000_000  # environment steps in all, rounded down to whole rollouts
    num_envs: int = 8  # N, parallel environments
    num_steps: int = 256  # T, steps of each environment per iteration

    # ---- PPO
    learning_rate: float = 3e-4  # Adam's step size, annealed linearly to 0
    gamma: float = 0.99  # γ, discount factor
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    num_minibatches: int = 32  # minibatches per epoch
    update_epochs: int = 10  # passes over the rollout per iteration
    chunk_length: int = 1  # L, consecutive steps of one environment sampled together (1: single steps, as published)
    clip_coef: float = 0.2  # ε of the clip; the neighbourhood's C is 1 + ε
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient, over all parameters together

    # ---- Deep SPI
    reward_loss_coef: float = 0.01  # α_R, weight of the reward loss, in standard deviations of A
    transition_loss_coef: float = 0.0005  # α_P, likewise; ℓ_P sums over z: set it anew for another φ
    loss_placement: Literal["utility", "additive", "gated"] = "utility"  # in U; beside J; in U where no clip is active

    def __post_init__(self):
        """Refuse what cannot work, in one line. Raises SystemExit(2), as for every usage error."""
        for name, kind in ((field.name, field.type) for field in fields(self) if field.type in (int, float)):
            least = 0 if name == "seed" or kind is float else 1
            self.check(name, least <= getattr(self, name) < np.inf, f"must be finite and at least {least}")
        for name in ("gamma", "gae_lambda"):
            self.check(name, getattr(self, name) <= 1, "must lie in [0, 1]")
        for name in ("learning_rate", "max_grad_norm"):
            self.check(name, getattr(self, name) > 0, "must be positive")
        self.check("seed", self.seed < 2**63, "must be below 2^63")
        self.check("clip_coef", 0 < self.clip_coef < 1, "must lie in (0, 1), so that 1 < C < 2")
        rollout, chunks = self.num_envs * self.num_steps, self.num_envs * self.num_steps // self.chunk_length
        self.check("total_timesteps", self.total_timesteps >= rollout, f"must be at least one rollout, {rollout}")
        self.check("chunk_length", self.num_steps % self.chunk_length == 0, f"must divide num_steps = {self.num_steps}")
        self.check("num_minibatches", chunks % self.num_minibatches == 0, f"must divide the rollout's {chunks} chunks")
        self.check("device", self.device != "cuda" or torch.cuda.is_available(), "this machine has no CUDA device")
        has_wandb = getattr(importlib.util.find_spec("wandb"), "origin", None)  # its log folder wandb/ has none
        self.check("track", not self.track or has_wandb, "needs wandb: pip install wandb")
        known = envpool.list_all_envs()
        closest = ", ".join(difflib.get_close_matches(self.env_id, known, cutoff=0.3))
        self.check("env_id", self.env_id in known, f"no such environment of EnvPool; closest: {closest or 'none'}")
        problem = what_is_wrong(self.env_id)
        self.check("env_id", not problem, problem)

    def check(self, name: str, allowed: object, rule: str) -> None:
        """Exit with one line on stderr unless the field is allowed."""
        if not allowed:
            print(f"error: --{name.replace('_', '-')}: got {getattr(self, name)!r}; {rule}", file=sys.stderr)
            raise SystemExit(2)


# ==== 2. Environment ==================================================================================================


def what_is_wrong(env_id: str) -> str:
    """Why an EnvPool environment is not for this script, or nothing. Makes a small one, to count its players."""
    warnings.filterwarnings("ignore", ".*precision lowered by casting")  # EnvPool's own spaces set it off
    try:
        spec = envpool.make_spec(env_id)
    except (ImportError, RuntimeError) as error:  # Procgen needs system libraries, VizdoomCustom a file
        return str(error)
    actions, observations = spec.action_space, spec.observation_space
    if not isinstance(actions, gym.spaces.Box):
        return f"actions must be continuous, not {type(actions).__name__}; for discrete ones see deep_spi_ppo.py"
    if not isinstance(observations, gym.spaces.Box) or not np.issubdtype(observations.dtype, np.floating):
        return "observations must be an array of floats"
    first, _ = envpool.make(env_id, env_type="gymnasium", num_envs=1).reset()
    return "" if len(first) == 1 else f"must have one player, not {len(first)}"


class Games:
    """N parallel environments, and the return and length of the episode that each is in."""

    def __init__(self, args: Args, start: int = 0):
        # EnvPool's own seeds are seed + i: neighbouring seeds would share games. A run that goes on plays new ones.
        stream = np.random.SeedSequence(args.seed, spawn_key=(start,) if start else ())
        self.envs = envpool.make(
            args.env_id,
            env_type="gymnasium",
            num_envs=args.num_envs,
            num_threads=min(args.num_envs, torch.get_num_threads()),  # EnvPool and torch take turns
            env_seed=(stream.generate_state(args.num_envs) >> 1).tolist(),  # signed 32 bits
        )
        self.num_inputs, self.space = int(np.prod(self.envs.observation_space.shape)), self.envs.action_space
        self.box = torch.from_numpy(np.stack((self.space.low, self.space.high)).astype(np.float32))  # (2, A)
        self.is_last = np.zeros(args.num_envs, dtype=bool)
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)

    def vectorize(self, obs: np.ndarray) -> Tensor:
        """Observations as float32 vectors (N, O)."""
        return torch.from_numpy(obs.reshape(len(obs), self.num_inputs).astype(np.float32))

    def reset(self) -> Tensor:
        """First observations (N, O)."""
        return self.vectorize(self.envs.reset()[0])

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[int, tuple[float, int]]]:
        """s', reward, is_terminal, is_last, (N, ...) each; and the episodes that ended: environment -> return, length.

        s' is the true next observation even at an end, where the next step only resets: a dummy row, of reward 0. What
        lies outside the box is executed on its border; the learner goes on with the actions (N, A) as they were drawn.
        """
        executed = actions.numpy().astype(self.space.dtype).clip(self.space.low, self.space.high)
        obs, rewards, terminated, truncated, _ = self.envs.step(executed)
        self.returns += rewards
        self.lengths += ~self.is_last
        self.is_last = terminated | truncated
        ended = np.flatnonzero(self.is_last)
        episodes = {int(i): (float(self.returns[i]), int(self.lengths[i])) for i in ended}
        self.returns[ended], self.lengths[ended] = 0, 0
        return self.vectorize(obs), *map(torch.from_numpy, (rewards, terminated, self.is_last)), episodes


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return, and clips them to ±10.

    One divisor for a whole rollout, so that the reward that A, the critic and R̄ see is one function of (s, a) within an
    update. Dummy rows do not count.
    """

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma, self.discounted = gamma, torch.zeros(num_envs)
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # of 1, G, G² over all real rows so far

    def scale(self, rewards: Tensor, is_last: Tensor) -> Tensor:
        """Scaled rewards (T, N) of raw ones (T, N), where is_last (T+1, N) says that obs[t] is an episode's last."""
        for t in range(len(rewards)):
            self.discounted = self.gamma * self.discounted * ~is_last[t] + rewards[t]  # dummies start from 0 again
            g, real = self.discounted.double(), (~is_last[t]).double()
            self.sums += torch.stack((real.sum(), (real * g).sum(), (real * g.square()).sum()))
        count, total, squares = self.sums
        std = (squares / count - (total / count).square()).clamp(min=1e-8).sqrt()
        return (rewards / std.float()).clamp(-10, 10)


# ==== 3. Networks =====================================================================================================
# B rows, O inputs, A numbers in an action, D in the latent z = φ(s): with this encoder 64.


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


class SpectralLayer(nn.Module):
    """Weight (out, in) or (out, in/groups, kh, kw), bias (out,); in use each of the G groups' matrix W is divided by σ.

    σ is W's largest singular value, u its left singular vector. The theorems want Lipschitz R̄ and P̄: so a linear layer
    is 1-Lipschitz. A convolution's W is (m, n) = (out/G, in/G·kh·kw): with 2x2 kernels the map may stretch by up to 2.
    ‖Wᵀu‖, with u held fixed, has σ's gradient. u is exact at the start, and follows W by subspace iteration.
    """

    def __init__(self, *shape: int, groups: int = 1):
        super().__init__()
        std = float(np.prod(shape[1:])) ** -0.5 / 0.87962566  # LeCun normal: 0.88 is the std left by truncation
        weight = nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std)
        self.weight, self.bias, self.groups = nn.Parameter(weight), nn.Parameter(torch.zeros(shape[0])), groups
        top = torch.linalg.svd(self.matrices().detach(), full_matrices=False).U[..., :16]  # (G, m, k <= 16)
        self.register_buffer("top", top.clone())
        self.register_buffer("u", top[..., :1].clone())  # (G, m, 1)

    def matrices(self) -> Tensor:
        """The weight as a matrix (G, m, n) for each group."""
        return self.weight.view(self.groups, len(self.weight) // self.groups, -1)

    @torch.no_grad()
    def follow(self) -> None:
        """A step of subspace iteration: u alone would be left behind where another singular value overtakes."""
        W = self.matrices()
        self.top.copy_(torch.linalg.qr(W @ (W.mT @ self.top)).Q)
        power = self.top.mT @ W @ W.mT @ self.top  # (G, k, k); its 4096th power is c·vvᵀ; CUDA waits for eigh
        for _ in range(12):
            power = power / torch.linalg.matrix_norm(power, keepdim=True)
            power = power @ power
        largest = power.diagonal(dim1=1, dim2=2).argmax(1)[:, None, None]  # the column of v's largest entry
        self.u.copy_(F.normalize(self.top @ power.take_along_dim(largest, dim=2), dim=1))

    def normalized_weight(self) -> Tensor:
        """The weight over its spectral norm, in float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            sigma = torch.linalg.vector_norm(self.matrices().mT @ self.u, dim=(1, 2), keepdim=True)
            return (self.matrices() / sigma).view_as(self.weight)


class RewardModel(nn.Module):
    """R̄(z, a): a 1-Lipschitz network of z and of the action as it is executed, clipped to the box."""

    def __init__(self, latent_size: int, box: Tensor):
        super().__init__()
        self.register_buffer("box", box, persistent=False)
        self.hidden1 = SpectralLayer(64, latent_size + box.shape[1])
        self.hidden2 = SpectralLayer(64, 64)
        self.output = SpectralLayer(1, 64)

    def forward(self, z: Tensor, actions: Tensor) -> Tensor:
        """Predicted scaled reward (B,) of latents z (B, D) and actions (B, A)."""
        x = torch.cat((z, actions.clamp(*self.box)), dim=1)
        x = group_sort(F.linear(x, self.hidden1.normalized_weight(), self.hidden1.bias))
        x = group_sort(F.linear(x, self.hidden2.normalized_weight(), self.hidden2.bias))
        return F.linear(x, self.output.normalized_weight(), self.output.bias).float().squeeze(1)


class TransitionModel(nn.Module):
    """P̄(·|z, a): a mixture of K = 5 diagonal normals over the next latent, from Lipschitz networks.

    Its sample averages over the components as published (a mixture's own would draw one of them):

        z̄' = Σ_k w_k (loc_k + scale_k n_k),    loc_k = ½ x_k,    scale_k = ½ softplus(y_k),    n ~ N(0, 1), cut to ±1

    x, y, w: of z and of the action as it is executed, clipped to the box.
    """

    def __init__(self, latent_size: int, box: Tensor):
        super().__init__()
        self.D, self.K = latent_size, 5
        self.noise_shape = (self.D, self.K)  # of a row
        self.register_buffer("box", box, persistent=False)
        self.hidden = SpectralLayer(64, latent_size + box.shape[1])
        self.components = SpectralLayer(self.D * self.K * 2, 64)
        self.mixture = SpectralLayer(self.K, 64)

    def forward(self, z: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """A sample z̄' (B, D) of P̄(·|z, a), for z (B, D), actions (B, A) and noise n (B, D, K)."""
        x = torch.cat((z, actions.clamp(*self.box)), dim=1)
        hidden = group_sort(F.linear(x, self.hidden.normalized_weight(), self.hidden.bias))  # (B, 64)
        outputs = F.linear(hidden, self.components.normalized_weight(), self.components.bias).float()
        x, y = outputs.view(-1, self.D, self.K, 2).unbind(-1)
        logits = F.linear(hidden, self.mixture.normalized_weight(), self.mixture.bias).float()
        weights = logits.softmax(1)[:, :, None]  # (B, K, 1)
        with torch.autocast(z.device.type, enabled=False):  # z̄' is compared with z' in float32
            return 0.5 * ((x + F.softplus(y) * noise) @ weights).squeeze(-1)


class Normalizer(nn.Module):
    """The first part of φ: observations less their running mean, over their running deviation, clipped to ±10.

    It moves between rollouts only, so that an update starts from the policy that played. That move is outside the clip
    of the objective; it fades as 1 / iterations. In the first rollout observations are only clipped. Dummy rows do not
    count.
    """

    def __init__(self, num_inputs: int):
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, num_inputs, dtype=torch.float64))  # of 1, x, x² over all real rows
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("std", torch.ones(num_inputs))

    def update(self, obs: Tensor, mask: Tensor) -> None:
        """Take a rollout (T, N, O) in, where the mask (T, N) is 1."""
        x = obs[mask > 0].double()
        self.sums += torch.stack((torch.ones_like(x), x, x.square())).sum(1)
        count, total, squares = self.sums
        self.mean.copy_(total / count)
        self.std.copy_((squares / count - (total / count).square()).clamp(min=1e-8).sqrt())

    def forward(self, obs: Tensor) -> Tensor:
        """Normalised observations (..., O)."""
        return ((obs - self.mean) / self.std).clamp(-10, 10)


class Agent(nn.Module):
    """π = π̄∘φ and its critic, with the world model (R̄, P̄) that reads the same latent."""

    def __init__(self, num_inputs: int, box: Tensor):
        super().__init__()
        latent_size, action_size = 64, box.shape[1]
        self.normalizer = Normalizer(num_inputs)
        self.encoder = nn.Sequential(
            layer_init(nn.Linear(num_inputs, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, latent_size)),
            nn.Tanh(),
        )
        self.actor = layer_init(nn.Linear(latent_size, action_size), gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(action_size))
        self.critic = nn.Sequential(  # with layers of its own, as CleanRL and SB3 have it: φ is the policy's alone
            layer_init(nn.Linear(num_inputs, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), gain=1.0),
        )
        with torch.random.fork_rng(devices=()):  # so that all else is drawn as in PPO, to the last bit
            self.reward_model = RewardModel(latent_size, box)
            self.transition_model = TransitionModel(latent_size, box)

    def encode(self, obs: Tensor) -> Tensor:
        """z = φ(s), (B, D), of observations (B, O)."""
        return self.encoder(self.normalizer(obs))

    def policy(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, A) of the actions, and logarithm (A,) of their standard deviation, the same in every state."""
        return self.actor(z).float(), self.log_std

    def value(self, obs: Tensor) -> Tensor:
        """Value (B,) of observations (B, O)."""
        return self.critic(self.normalizer(obs)).float().squeeze(-1)


# ==== 4. Equations ====================================================================================================
# T steps, N environments, M rows of a minibatch, A numbers an action. A row is a transition (s, a, s'). Where s is
# already the last of an episode the row is an auto-reset dummy, not a transition: its mask is 0 and it counts nowhere.


class Transitions(NamedTuple):
    """The M transitions of a minibatch: M/L chunks of L steps, row after row."""

    obs: Tensor  # (M/L, L + 1, O) the observations s, and the last s'; without a world model (M/L, L, O)
    actions: Tensor  # (M, A) as drawn, before they are clipped to the box
    rewards: Tensor  # (M,) scaled
    old_log_probs: Tensor  # (M,) ln π_old of the action's density
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


def log_density(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln π(a|s) of actions (..., A), whose numbers are independent normals: (...)."""
    z_scores = (actions - mean) / log_std.exp()
    return (-0.5 * z_scores.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def clipped_objective(ratio: Tensor, utility: Tensor, clip_coef: float) -> Tensor:
    """min(r U, clip(r, 1 ± ε) U), per transition: (M,). Gradient flows through r, and through U if it has one."""
    return torch.min(ratio * utility, ratio.clamp(1 - clip_coef, 1 + clip_coef) * utility)


def share_outside(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], mask: Tensor, clip_coef: float, num_samples: int = 16
) -> Tensor:
    """Share of state-action space where π_new/π_old lies outside [2 - C, C], C = 1 + ε: 16 draws of π_old a state.

    old, new: mean (T, N, A) and log_std (A,) of the policies in a rollout's states; mask (T, N). The theorem wants none
    outside, and one support. All normals share theirs. But the ratio of two that differ has no bound in the tails, or
    falls to 0: strictly, N^C(π) holds no normal but π. What can be kept small is the probability outside. (Actions as
    they are executed, clipped to the box, have bounded ratios: of that policy the theorem's condition can hold.)
    """
    noise = torch.randn(num_samples, *old[0].shape).to(old[0].device)
    actions = old[0] + old[1].exp() * noise
    ratios = (log_density(actions, *new) - log_density(actions, *old)).exp()  # (num_samples, T, N)
    outside = (ratios > 1 + clip_coef) | (ratios < 1 - clip_coef)
    return masked_mean(outside.float().mean(0), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[return - V] / Var[return] over the real rows: 1 is perfect, 0 no better than a constant."""
    returns = returns.double()  # so that the variance of constants is exactly 0
    errors, variance = (masked_mean((x - masked_mean(x, mask)).square(), mask) for x in (returns - values, returns))
    return torch.where(variance > 0, 1 - errors / variance, 0.0)


def latents(agent: Agent, batch: Transitions) -> tuple[Tensor, Tensor]:
    """z = φ(s) and, with a world model, z' = φ(s') of the M transitions; not detached. Nothing is encoded twice."""
    z = agent.encode(batch.obs.flatten(0, 1)).unflatten(0, batch.obs.shape[:2])  # (M/L, L + 1, ...)
    length = len(batch.actions) // len(z)  # L
    return z[:, :length].flatten(0, 1), z[:, 1:].flatten(0, 1)


def what_the_model_knows(agent: Agent, batch: Transitions) -> dict[str, Tensor]:
    """ℓ_P of P̄'s mean, beside that of z' = z; ℓ_R of always predicting 0; the variance of z over the batch."""
    z, next_z = latents(agent, batch)
    noise = torch.zeros(len(z), *agent.transition_model.noise_shape, dtype=z.dtype, device=z.device)
    mean = masked_mean(transition_loss(agent.transition_model(z, batch.actions, noise), next_z), batch.mask)
    copy = masked_mean(transition_loss(z, next_z), batch.mask)
    return {
        "world_model/transition_loss_mean": mean,
        "world_model/transition_loss_copy": copy,
        "world_model/transition_loss_ratio": mean / copy.clamp(min=1e-12),
        "world_model/reward_loss_zero": masked_mean(reward_loss(0 * batch.rewards, batch.rewards), batch.mask),
        "world_model/latent_variance": z.float()[batch.mask > 0].var(0, correction=0).mean(),
    }


def compute_loss(agent: Agent, batch: Transitions, args: Args, noise: Tensor | None) -> tuple[Tensor, dict]:
    """The loss of a minibatch, and what of it is logged. Without noise the world model is not run: this is PPO."""
    z, next_z = latents(agent, batch)
    mean, log_std = agent.policy(z)  # (M, A), (A,)
    values = agent.value(batch.obs[:, : len(z) // len(batch.obs)].flatten(0, 1))  # (M,)
    log_ratio = log_density(batch.actions, mean, log_std) - batch.old_log_probs  # (M,)
    ratio = log_ratio.exp()

    advantages = normalize(batch.advantages, batch.mask)  # of A, not of the losses
    utility, additive_loss, world_model_stats = advantages, 0.0, {}
    if noise is not None:
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
    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()  # the same in every state
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss + additive_loss

    stats = {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": masked_mean(ratio - 1 - log_ratio, batch.mask),
        "losses/clipfrac": masked_mean(((ratio - 1).abs() > args.clip_coef).float(), batch.mask),
        **world_model_stats,
        "spi/ratios": torch.where(batch.mask > 0, ratio, 1.0),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


# ==== 5. Training =====================================================================================================


def train(args: Args) -> None:
    """Play a rollout, estimate its advantages, learn from it; again and again."""
    T, N, L = args.num_steps, args.num_envs, args.chunk_length
    torch.set_num_threads(1)  # layers this small gain nothing from a second, and wait for it where a core is busy
    run_world_model = args.reward_loss_coef > 0 or args.transition_loss_coef > 0
    run, num_iterations = Run(args), args.total_timesteps // (T * N)
    device, autocast = args.device, torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")

    torch.manual_seed(args.seed)
    games = Games(args, run.iterations)
    agent = Agent(games.num_inputs, games.box).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    spectral_layers = [module for module in agent.modules() if isinstance(module, SpectralLayer)]
    reward_scaler = RewardScaler(N, args.gamma)
    learned = {"agent": agent, "optimizer": optimizer, "reward_scaler": reward_scaler}
    if run.state:
        torch.set_rng_state(run.state["rng"])
        for name, part in learned.items():
            part.load_state_dict(run.state[name])

    # Observations, policies and actions live on the device; the rest, like the games, on the CPU.
    obs = torch.zeros((T + 1, N, games.num_inputs), device=device)
    means, actions = torch.zeros((2, T, N, games.box.shape[1]), device=device)
    log_probs = torch.zeros((T, N), device=device)
    values = torch.zeros((T + 1, N), device=device)
    rewards = torch.zeros((T, N))
    is_terminal, is_last = torch.zeros((2, T + 1, N), dtype=torch.bool)  # obs[t]: its value is 0; it ends an episode
    obs[T] = games.reset()

    for iteration in range(run.iterations, num_iterations):
        # ---- Rollout
        optimizer.param_groups[0]["lr"] = (1 - iteration / num_iterations) * args.learning_rate
        obs[0], is_last[0] = obs[T], is_last[T]  # is_terminal[0] is never read
        for t in range(T):
            with torch.no_grad(), autocast:
                (means[t], log_std), values[t] = agent.policy(agent.encode(obs[t])), agent.value(obs[t])
                actions[t] = means[t] + log_std.exp() * torch.randn(means[t].shape).to(device)
                log_probs[t] = log_density(actions[t], means[t], log_std)
            if not log_probs[t].isfinite().all():
                raise FloatingPointError("not finite: log_probs")
            obs[t + 1], rewards[t], is_terminal[t + 1], is_last[t + 1], episodes = games.step(actions[t].cpu())
            run.log_episodes((iteration * T + t + 1) * N, episodes)

        # ---- Advantages
        with torch.no_grad(), autocast:
            values[T] = agent.value(obs[T])
        scaled = reward_scaler.scale(rewards, is_last)
        advantages, returns = compute_gae(scaled, values.cpu(), is_terminal, is_last, args.gamma, args.gae_lambda)
        mask = (~is_last[:T]).float()
        of_steps = [x.to(device) for x in (actions, scaled, log_probs, advantages, returns, mask)]  # as in Transitions

        # ---- Update
        old = means, log_std.detach().clone()  # the policy that played
        noise = None
        if run_world_model:  # drawn once per iteration, for all minibatches: drawing takes long on a CPU
            noise = torch.randn(T * N // args.num_minibatches, *agent.transition_model.noise_shape).clamp(-1, 1)
            noise = noise.to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
        for _ in range(args.update_epochs):
            epoch_stats, stats = [], {}
            for chunks in torch.randperm(N * T // L).chunk(args.num_minibatches):
                # Chunk c is L steps of environment c % N, from step c // N * L on, and the observation after them.
                t = chunks[:, None] // N * L + torch.arange(L + run_world_model)
                rows = t * N + chunks[:, None] % N  # (M/L, L + 1), of the (T + 1) N observations
                if not mask.flatten()[rows[:, :L]].any():
                    continue  # dummies alone: nothing to learn from
                steps, rows = rows[:, :L].flatten().to(device), rows.to(device)
                chunk_obs = obs.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
                batch = Transitions(chunk_obs, *(x.flatten(0, 1)[steps] for x in of_steps))
                with autocast:
                    loss, stats = compute_loss(agent, batch, args, noise)
                optimizer.zero_grad()
                loss.backward()
                stats["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                for layer in spectral_layers:
                    layer.follow()
                epoch_stats.append(stats)

        # ---- Logging: losses of the last epoch
        table = {name: torch.stack([row[name] for row in epoch_stats]) for name in stats}
        ratios = table.pop("spi/ratios", torch.ones(1)).cpu()
        metrics = {name: column.mean().item() for name, column in table.items()}
        metrics["spi/ratio_min"], metrics["spi/ratio_max"] = ratios.min().item(), ratios.max().item()
        with torch.no_grad(), autocast:
            if run_world_model and epoch_stats:
                metrics |= {name: value.item() for name, value in what_the_model_knows(agent, batch).items()}
            new = agent.policy(agent.encode(obs[:T]))
            metrics["spi/outside_neighbourhood"] = share_outside(old, new, of_steps[-1], args.clip_coef).item()
            if not (log_density(new[0] + new[1].exp(), *new) + agent.value(obs[:T])).isfinite().all():
                raise FloatingPointError("not finite: log_probs or value, after the update")  # before they are written
        metrics["losses/explained_variance"] = explained_variance(values[:T].cpu(), returns, mask).item()
        metrics["losses/weight_norm"] = nn.utils.get_total_norm(agent.parameters()).item()
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        agent.normalizer.update(obs[:T], of_steps[-1])
        run.end_iteration(metrics, ratios, learned)


# ==== 6. The run's folder =============================================================================================


class Run:
    """One run: its folder, its log, and the checkpoint that it goes on from.

    config.json: settings, machine, versions, commit      <script>.py: this very code; evaluate.py plays with it
    episodes.csv: global step, return, length             checkpoint.pt: all that the run needs to go on
    events.*: curves, for TensorBoard                     agent.pt: the final weights, when all is done
    """

    def __init__(self, args: Args):
        """Open the folder, new or of a run to go on with. Raises SystemExit: 2 if it cannot be, 0 if all is done."""
        script, self.args, self.signal = Path(__file__).resolve(), args, None
        self.rollout = args.num_envs * args.num_steps  # global steps of an iteration

        name = f"{args.env_id.replace('/', '-')}__{script.stem}__{args.seed}__{int(time.time())}"
        self.dir = Path(os.path.realpath(args.run_dir or f"runs/{name}"))  # has a name and a parent, whatever was typed
        try:
            str(self.dir).encode()  # TensorBoard takes UTF-8 only
            self.dir.mkdir(parents=True, exist_ok=True)
            self.episodes = open(self.dir / "episodes.csv", "a", buffering=1)  # each line is flushed
            fcntl.flock(self.episodes, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (OSError, UnicodeError) as error:
            args.check("run_dir", False, f"cannot be used, or another process is at it: {error}")
        git = {"shell": True, "cwd": script.parent, "capture_output": True, "text": True}
        commit = subprocess.run("git describe --always --abbrev=40 --exclude '*' --dirty", **git).stdout.strip()
        if commit and script.name not in subprocess.run("git ls-files -z", **git).stdout.split("\0"):
            commit += "-untracked"
        config = {
            "script": script.name,
            "script_path": str(script),
            "args": vars(args),
            "git_commit": commit or None,
            "machine": f"{torch.cpu.get_capabilities()['cpu_name']}, {os.cpu_count()} cores, {sys.platform}",
            "torch_threads": torch.get_num_threads(),
            "versions": {"python": sys.version.split()[0]} | {m.__name__: m.__version__ for m in (torch, envpool, np)},
            "id": f"{time.time_ns():x}",  # for Weights & Biases
            "resumes": [],  # global steps at which the run went on, with new games
        }
        self.config = json.loads(json.dumps(config, default=str))  # plain types: a checkpoint holds no others
        path, self.state = self.dir / "checkpoint.pt", {}
        if path.exists():
            try:
                assert zipfile.ZipFile(path).testzip() is None  # its check sums, which torch.load does not look at
                self.state = torch.load(path, map_location="cpu", weights_only=True)
                assert self.episodes.tell() >= self.state["episodes_bytes"]
                before = self.state["config"]["args"] | {"script": self.state["config"]["script"]}
                resumes = [*self.state["config"]["resumes"], self.state["iterations"] * self.rollout]
                self.config |= {"id": self.state["config"]["id"], "resumes": resumes}
            except Exception:  # of many kinds, as any byte may be wrong
                args.check("run_dir", False, "its checkpoint.pt or its episodes.csv is damaged")
            now = self.config["args"] | {"script": script.name}
            changed = [name for name in now if name not in MAY_CHANGE and now[name] != before.get(name)]
            rule = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}, not {now[name]}" for name in changed)
            args.check("run_dir", not changed, f"is a run with {rule}")
            own, rule = self.dir / script.name, f"was made by another version of {script.name}: run the copy in it"
            args.check("run_dir", not own.exists() or own.read_bytes() == script.read_bytes(), rule)
        self.iterations, self.start_time = self.state.get("iterations", 0), time.time() - self.state.get("seconds", 0)
        step = self.iterations * self.rollout
        if step + self.rollout > args.total_timesteps:
            print(f"{self.dir}: complete; a larger --total-timesteps makes it longer")
            raise SystemExit(0)

        text = json.dumps(self.config, indent=2) + "\n"
        (self.dir / "config.json").write_text(text)
        if self.dir != script.parent:  # else it is there already: a full disk must not take it
            (self.dir / script.name).write_bytes(script.read_bytes())
        (self.dir / "agent.pt").unlink(missing_ok=True)
        self.episodes.seek(self.episodes.truncate(self.state.get("episodes_bytes", 0)))  # what came later is made again
        self.episodes.write("" if self.state else "global_step,return,length\n")
        if args.track:
            import wandb  # optional, and nobody else should have to wait for it

            names = {"id": self.config["id"], "name": self.dir.name, "dir": self.dir.parent, "resume": "allow"}
            wandb.init(**names, config=self.config, sync_tensorboard=True)
        self.writer = SummaryWriter(self.dir, purge_step=step + 1)
        self.writer.add_text("config", f"```\n{text}```", step)
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", desc=self.dir.name)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.stop)

    def stop(self, number: int, _) -> None:
        """On a signal: end after this iteration. The second of the kind ends the process at once."""
        self.signal, self.bar.disable = signal.Signals(number), True  # the bar's pipe may have ended with the signal
        signal.signal(number, signal.SIG_DFL)

    def log_episodes(self, step: int, episodes: dict[int, tuple[float, int]]) -> None:
        """Return and length of every episode that has ended."""
        for episodic_return, length in episodes.values():
            self.episodes.write(f"{step},{episodic_return},{length}\n")
            self.writer.add_scalar("charts/episodic_return", episodic_return, step)
            self.writer.add_scalar("charts/episodic_length", length, step)
            self.bar.set_postfix({"return": episodic_return}, refresh=False)

    def end_iteration(self, metrics: dict[str, float], ratios: Tensor, learned: dict) -> None:
        """Log; write the checkpoint when it is due. Raises FloatingPointError, and SystemExit(75) after a signal."""
        self.iterations += 1
        step, seconds = self.iterations * self.rollout, time.time() - self.start_time
        for name, value in {**metrics, "charts/SPS": step / seconds}.items():
            if not np.isfinite(value) and not name.startswith("spi/"):  # a ratio may overflow, and harm nothing
                raise FloatingPointError(f"not finite: {name}, at step {step}")
            self.writer.add_scalar(name, value, step)
        self.bar.update(self.rollout)
        complete = step + self.rollout > self.args.total_timesteps
        if not (complete or self.signal or self.iterations % self.args.checkpoint_interval == 0):
            return

        self.writer.add_histogram("spi/ratios", ratios.nan_to_num(), step, bins=200)
        self.writer.flush()
        os.fsync(self.episodes.fileno())
        state = {name: part.state_dict() for name, part in learned.items()} | {"rng": torch.get_rng_state()}
        state |= {"config": self.config, "episodes_bytes": self.episodes.tell()}
        state |= {"iterations": self.iterations, "seconds": seconds}
        for name, part in {**({"agent": state["agent"]} if complete else {}), "checkpoint": state}.items():
            torch.save(part, content := io.BytesIO())  # not to the file: what a full disk raises is no OSError there
            temporary = self.dir / f"{name}.tmp"
            try:  # at any instant, power cuts included, the old file or the new one is there
                with open(temporary, "wb") as file:
                    file.write(content.getvalue())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.dir / f"{name}.pt")
            finally:
                temporary.unlink(missing_ok=True)
        if complete:
            self.bar.close()
            print(f"{self.dir}: complete; curves: tensorboard --logdir {self.dir.parent}")
        elif self.signal:
            print(f"\nstopped by {self.signal.name}; to go on: the same, with --run-dir {self.dir}", file=sys.stderr)
            raise SystemExit(75)


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's thread: its error is raised again here, and told below
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # whatever the locale and a path's bytes
    try:
        train(tyro.cli(Args, description=__doc__))
    except (FloatingPointError, OSError) as error:  # OSError: a full disk, say; the last checkpoint is whole
        sys.exit(f"\nerror: {error}")
