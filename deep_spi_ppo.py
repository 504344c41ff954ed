"""Deep SPI on vector observations: safe policy improvement via world models (Delgrange, Avalos, Röpke, ICLR 2026).

    python deep_spi_ppo.py                                 # solves CartPole-v1 in about a minute on a laptop
    python deep_spi_ppo.py --env-id LunarLander-v3 --total-timesteps 1500000

A policy π = π̄∘φ acts on a learned latent z = φ(s). A world model (R̄, P̄) is learned on φ beside it, and its losses stand
inside PPO's clipped objective: the clip that keeps the new policy in a neighbourhood of the last one also bounds how
far those losses may move φ. That is the whole method:

    U(s,a,s') = A(s,a) - α_R ℓ_R(s,a) - α_P ℓ_P(s,a,s')
    J         = E[ min( r U, clip(r, 1 ± ε) U ) ],       r = π_new(a|s) / π_old(a|s)

    φ  encoder            R̄  reward_model        ℓ_R  reward_loss        α_R  reward_loss_coef
    z  z, next_z          P̄  transition_model    ℓ_P  transition_loss    α_P  transition_loss_coef
    U  utility            N^C neighbourhood: 2 - C <= π'(a|s)/π(a|s) <= C, here with C = 1 + ε

One set of defaults, with nothing but the number of steps to set: README.md has the results.
Any EnvPool environment will do that has discrete actions and observes an array of floats or an integer.
Diff me against `deep_spi_ppo_atari.py`, the same algorithm on pixels. With both coefficients 0 this is PPO.
"""
# ==== 1. Imports ======================================================================================================

import csv
import difflib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from dataclasses import dataclass
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

# ==== 2. Arguments ====================================================================================================


@dataclass
class Args:
    # ---- Experiment
    seed: int = 1
    """seed of the environments, the networks and every random draw"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA if present"""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """arithmetic of the networks; auto takes bf16 where the hardware has it (CUDA, AMX, AVX512-BF16); losses: fp32"""
    compile: bool = False
    """compile the networks with torch.compile: for CUDA; on a CPU it takes a C++ compiler and gains next to nothing"""
    runs_dir: str = "runs"
    """folder in which the run's own folder is made"""
    run_name: str | None = None
    """name of the run's folder, which must not exist yet (default: <env_id>__<script>__<seed>__<time>)"""
    checkpoint_interval: int = 100
    """iterations from one checkpoint to the next; there is one at the end, and on a signal to stop, in any case"""
    resume: bool = False
    """continue the run named by --run-name from its checkpoint; of its settings, only total_timesteps may change"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb; WANDB_PROJECT and WANDB_ENTITY say where)"""

    # ---- Environment
    env_id: str = "CartPole-v1"
    """EnvPool id of an environment with discrete actions and no pixels"""
    total_timesteps: int = 200_000
    """environment steps in all, rounded down to whole rollouts"""
    num_envs: int = 64
    """N, parallel environments"""
    num_steps: int = 64
    """T, steps of each environment per iteration"""
    sticky: float = 0.0
    """probability that the last action is repeated instead of the one chosen, which makes the task stochastic"""

    # ---- PPO
    learning_rate: float = 2e-3
    """Adam's step size, annealed linearly to 0"""
    gamma: float = 0.999
    """γ, discount factor"""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    update_epochs: int = 4
    """passes over the rollout per iteration"""
    chunk_length: int = 8
    """L, consecutive steps of one environment sampled together (1: independent transitions, as published)"""
    clip_coef: float = 0.2
    """ε of the clip; the neighbourhood's C is 1 + ε"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient, over all parameters together"""

    # ---- Deep SPI
    reward_loss_coef: float = 0.01
    """α_R, weight of the reward loss"""
    transition_loss_coef: float = 0.0005
    """α_P, weight of the transition loss"""
    loss_placement: Literal["utility", "additive"] = "utility"
    """where the world model's losses go: into the utility, under the clip (Deep SPI), or beside the clipped loss"""
    spectral_norm: Literal["exact", "published"] = "exact"
    """W/σ, or the published code's rule, which comes to about W/σ²"""


def check(allowed: bool, flag: str, given: object, rule: str) -> None:
    """Refuse a bad argument in one line, before anything is built; exit code 2, like every usage error."""
    if not allowed:
        print(f"error: --{flag.replace('_', '-')}: got {given!r}; {rule}", file=sys.stderr)
        raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuse settings that cannot work. Raises SystemExit(2) after one line on stderr."""
    given = vars(args)
    positive = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "chunk_length", "checkpoint_interval")
    for name in positive:
        check(given[name] >= 1, name, given[name], "must be at least 1")
    for name in ("sticky", "gamma", "gae_lambda"):
        check(0 <= given[name] <= 1, name, given[name], "must lie in [0, 1]")
    for name in ("ent_coef", "vf_coef", "reward_loss_coef", "transition_loss_coef"):
        check(0 <= given[name] < math.inf, name, given[name], "must be finite and not negative")
    for name in ("learning_rate", "max_grad_norm"):
        check(0 < given[name] < math.inf, name, given[name], "must be finite and positive")
    check(0 < args.clip_coef < 1, "clip_coef", args.clip_coef, "must lie in (0, 1), so that 1 < C < 2")
    check(0 <= args.seed < 2**63, "seed", args.seed, "must lie in [0, 2^63)")
    batch_size, length = args.num_envs * args.num_steps, args.chunk_length
    rule = f"must be at least one rollout, num_envs x num_steps = {batch_size}"
    check(args.total_timesteps >= batch_size, "total_timesteps", args.total_timesteps, rule)
    check(args.num_steps % length == 0, "chunk_length", length, f"must divide num_steps = {args.num_steps}")
    rule = f"must divide the rollout's {batch_size // length} chunks (num_envs x num_steps / chunk_length)"
    check(batch_size // length % args.num_minibatches == 0, "num_minibatches", args.num_minibatches, rule)
    check(args.device != "cuda" or torch.cuda.is_available(), "device", args.device, "this machine has no CUDA device")
    compiler = (args.device != "cpu" and torch.cuda.is_available()) or shutil.which("g++") or shutil.which("clang++")
    check(not args.compile or bool(compiler), "compile", args.compile, "takes a C++ compiler on a CPU, g++ or clang++")
    check(not args.resume or bool(args.run_name), "resume", args.resume, "needs the run's name: --run-name")
    tracking = not args.track or importlib.util.find_spec("wandb") is not None
    check(tracking, "track", args.track, "needs Weights & Biases: pip install wandb")


# ==== 3. Environment ==================================================================================================


def check_env(env_id: str) -> tuple[int, int]:
    """Number of actions A and of inputs O, without building it. Raises SystemExit(2) if the script is not for it."""
    known = envpool.list_all_envs()
    if env_id not in known:
        closest = ", ".join(difflib.get_close_matches(env_id, known, cutoff=0.4)) or "none; see envpool.list_all_envs()"
        check(False, "env_id", env_id, f"no such environment; closest: {closest}")
    warnings.filterwarnings("ignore", ".*precision lowered by casting")  # EnvPool's own spaces set it off
    try:
        spec = envpool.make_spec(env_id)
    except ImportError as error:  # Procgen needs system libraries
        check(False, "env_id", env_id, str(error))
    actions, observations = spec.action_space, spec.observation_space
    check(isinstance(actions, gym.spaces.Discrete), "env_id", env_id, f"actions must be discrete, not {actions}")
    integer = isinstance(observations, gym.spaces.Discrete)
    array = isinstance(observations, gym.spaces.Box) and np.issubdtype(observations.dtype, np.floating)
    rule = "observations must be an integer or an array of floats; for Atari frames see deep_spi_ppo_atari.py"
    check(integer or array, "env_id", env_id, rule)
    return int(actions.n), int(observations.n) if integer else math.prod(observations.shape)


def vectorize(obs: np.ndarray, num_inputs: int) -> np.ndarray:
    """Observations as float32 vectors (N, O): integers (N,) one-hot, arrays of floats flattened."""
    if np.issubdtype(obs.dtype, np.integer):
        return (obs[:, None] == np.arange(num_inputs)).astype(np.float32)
    return obs.reshape(len(obs), num_inputs).astype(np.float32)


def env_seeds(seed: int, num_envs: int, resumes: int = 0) -> list[int]:
    """One seed per environment. EnvPool's own are seed + i, so that neighbouring seeds would share their streams.

    A run that was resumed so many times draws from another stream each time, or it would see the same starts again.
    """
    stream = np.random.SeedSequence(seed, spawn_key=range(resumes))
    return (stream.generate_state(num_envs) >> 1).tolist()  # signed 32 bits


def make_envs(args: Args, resumes: int = 0):
    """N parallel environments. EnvPool and torch take turns, so each gets as many threads as torch may use."""
    return envpool.make(
        args.env_id,
        env_type="gymnasium",
        num_envs=args.num_envs,
        num_threads=min(args.num_envs, torch.get_num_threads()),
        env_seed=env_seeds(args.seed, args.num_envs, resumes),
    )


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return, and clips them to ±10.

    One divisor for a whole rollout, so that the reward that A, the critic and R̄ see is one function of (s, a) within an
    update. Dummy rows do not count.
    """

    def __init__(self, num_envs: int, gamma: float, device: torch.device):
        super().__init__()
        self.gamma, self.discounted = gamma, torch.zeros(num_envs, device=device)
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # of 1, G, G² over all real rows so far
        self.register_buffer("sums", sums)

    def scale(self, rewards: Tensor, dones: Tensor) -> Tensor:
        """Scaled rewards (T, N) of raw ones (T, N), where dones (T+1, N) says that obs[t] is an episode's last."""
        for t in range(len(rewards)):
            self.discounted = self.gamma * self.discounted * ~dones[t] + rewards[t]  # dummies start from 0 again
            g, real = self.discounted.double(), (~dones[t]).double()
            self.sums += torch.stack((real.sum(), (real * g).sum(), (real * g.square()).sum()))
        count, total, squares = self.sums
        std = (squares / count - (total / count).square()).clamp(min=1e-8).sqrt()
        return (rewards / std.float()).clamp(-10, 10)


# ==== 4. Networks =====================================================================================================
# B rows, O inputs, A actions. The latent z = φ(s) is (B, 32).


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights of gain `std`, zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def group_sort(x: Tensor) -> Tensor:
    """GroupSort(2): sort neighbouring pairs along dimension 1, ascending. Gradient norm 1 where ReLU's may be 0."""
    first, second = x.unflatten(1, (-1, 2)).unbind(2)
    swap = F.relu(first - second)  # min and max, but for rounding; their own gradients take several times as long
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


def published_spectral_norm(matrix: Tensor, v: Tensor) -> Tensor:
    """The published code's divisor for each matrix (G, m, n), shape (G,): two power steps from the fixed start v (n,).

    The last v is left unnormalised, so that this is near σ² where σ is meant; gradient flows through u and v.
    """
    v = v[:, None]
    for _ in range(2):
        v = v / (v.square().sum(-2, keepdim=True) + 1e-8).sqrt()
        u = matrix @ v
        u = u / (u.square().sum(-2, keepdim=True) + 1e-8).sqrt()
        v = matrix.mT @ u
    return (u * (matrix @ v)).sum((-2, -1))


class SpectralLayer(nn.Module):
    """Weight (out, in) or (out, in/groups, kh, kw) and bias (out,); normalised, each group's matrix has σ = 1.

    So a linear layer is 1-Lipschitz. For a convolution σ is that of the matrix (out, in·kh·kw): with 2x2 kernels the
    map itself may stretch by up to 2.
    """

    def __init__(self, shape: tuple[int, ...], rule: str, generator: torch.Generator, groups: int = 1):
        super().__init__()
        fan_in = math.prod(shape[1:])
        std = math.sqrt(1 / fan_in) / 0.87962566  # LeCun normal: the divisor makes up for the tails cut at 2 std
        weight = nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(shape[0]))
        self.rule, self.groups = rule, groups
        if rule == "published":
            length = shape[0] if len(shape) == 2 else fan_in
            start = torch.randn(length, generator=torch.Generator().manual_seed(0))
            self.register_buffer("power_start", start, persistent=False)  # the same in every run

    def normalized_weight(self) -> Tensor:
        """The weight over its spectral norm, in float32. To be worked out once per forward."""
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.view(self.groups, self.weight.shape[0] // self.groups, -1)
            if self.rule == "exact":
                sigma = exact_spectral_norm(matrix)
            else:  # there a linear layer's matrix is (in, out)
                matrix = matrix.mT if self.weight.ndim == 2 else matrix
                sigma = published_spectral_norm(matrix, self.power_start)
            return (self.weight.view(self.groups, -1) * sigma.reciprocal()[:, None]).view_as(self.weight)


class RewardModel(nn.Module):
    """R̄(z, a): a 1-Lipschitz network with one output per action."""

    def __init__(self, num_actions: int, rule: str, generator: torch.Generator):
        super().__init__()
        self.hidden1 = SpectralLayer((64, 32), rule, generator)
        self.hidden2 = SpectralLayer((64, 64), rule, generator)
        self.output = SpectralLayer((num_actions, 64), rule, generator)

    def forward(self, z: Tensor, actions: Tensor) -> Tensor:
        """Predicted scaled reward (B,) of latents z (B, 32) and actions (B,)."""
        x = group_sort(F.linear(z, self.hidden1.normalized_weight(), self.hidden1.bias))
        x = group_sort(F.linear(x, self.hidden2.normalized_weight(), self.hidden2.bias))
        x = F.linear(x, self.output.normalized_weight(), self.output.bias).float()  # (B, A)
        return x.gather(1, actions[:, None]).squeeze(1)


class TransitionModel(nn.Module):
    """P̄(·|z, a): a mixture of K = 5 diagonal normals over the next latent, from Lipschitz networks."""

    def __init__(self, num_actions: int, rule: str, generator: torch.Generator):
        super().__init__()
        self.num_actions, self.noise_shape = num_actions, (32, 5)
        self.hidden = SpectralLayer((64, 32), rule, generator)
        self.components = SpectralLayer((32 * 5 * 2 * num_actions, 64), rule, generator)
        self.mixture = SpectralLayer((5 * num_actions, 64), rule, generator)

    def forward(self, z: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """One reparameterised sample z̄' of P̄(·|z, a), shape (B, 32), of z (B, 32) and actions (B,).

        `noise` is standard normal, (B, 32, K); z̄' = Σ_k w_k (loc_k + scale_k clip(noise_k, -1, 1)):
        the published sample averages over the components, where a mixture's own would draw one of them.
        """
        hidden = group_sort(F.linear(z, self.hidden.normalized_weight(), self.hidden.bias))  # (B, 64)
        # Outputs are ordered (32 latent dimensions, K components, [loc, scale], A actions), and (K, A).
        outputs = F.linear(hidden, self.components.normalized_weight(), self.components.bias).float()
        outputs = outputs.view(-1, 32 * 5 * 2, self.num_actions).take_along_dim(actions[:, None, None], dim=2)
        loc, scale = outputs.view(-1, 32, 5, 2).unbind(-1)
        logits = F.linear(hidden, self.mixture.normalized_weight(), self.mixture.bias).float()
        logits = logits.view(-1, 5, self.num_actions).take_along_dim(actions[:, None, None], dim=2)
        weights = logits.softmax(1)  # (B, K, 1)
        spread = F.softplus(scale) * noise.clamp(-1, 1)  # (B, 32, K)
        with torch.autocast(z.device.type, enabled=False):  # z̄' is compared with z' in float32
            return 0.5 * ((loc + spread) @ weights).squeeze(-1)


class Agent(nn.Module):
    """π = π̄∘φ and its critic, with the world model (R̄, P̄) that reads the same latent."""

    def __init__(self, num_inputs: int, num_actions: int, spectral_norm: str, generator: torch.Generator):
        super().__init__()
        self.encoder = nn.Sequential(
            layer_init(nn.Linear(num_inputs, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 32)),
            nn.Tanh(),
        )
        self.reward_model = RewardModel(num_actions, spectral_norm, generator)
        self.transition_model = TransitionModel(num_actions, spectral_norm, generator)
        self.fc = layer_init(nn.Linear(32, 64))
        self.actor = layer_init(nn.Linear(64, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(64, 1), std=1.0)

    def encode(self, obs: Tensor) -> Tensor:
        """z = φ(s), (B, 32), of observations (B, O)."""
        return self.encoder(obs)

    def policy_and_value(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, A) of every action, and the value (B,), of latents z."""
        hidden = self.fc(z).tanh()
        return self.actor(hidden).float().log_softmax(-1), self.critic(hidden).float().squeeze(-1)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Host to device without either waiting for the other: on CUDA a pinned, non-blocking copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


# ==== 5. Equations ====================================================================================================
# T steps, N environments, M rows of a minibatch, A actions. A row is a transition (s, a, r, s'). Where s is already the
# end of an episode the row is an auto-reset dummy, not a transition: its mask is 0 and it counts nowhere.


class Minibatch(NamedTuple):
    """M transitions: what `compute_loss` needs beside the latents. A whole rollout has (T, N) in place of (M,)."""

    actions: Tensor  # (M,) int64
    rewards: Tensor  # (M,) clipped or scaled: those the advantages are made of
    old_log_probs: Tensor  # (M, A) ln π_old of every action
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,) the value function's target
    mask: Tensor  # (M,) 1 real, 0 dummy


def compute_gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, dones: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, both (T, N) (Schulman et al., 2016, eq. 16).

    rewards (T, N); values (T+1, N) of obs[0..T]; terminated (T, N): step t ended in a terminal state, of value 0;
    dones (T+1, N): obs[t] is an episode's last, so dones[t+1] cuts the sum over step t's successors. A truncated step
    has dones[t+1] but not terminated[t]: it is bootstrapped with the value of its true last observation.
    """
    assert values.shape == dones.shape == (len(rewards) + 1, *rewards.shape[1:]) and terminated.shape == rewards.shape
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]  # (T, N)
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantage = deltas[t] + gamma * gae_lambda * ~dones[t + 1] * advantage
        advantages[t] = advantage
    return advantages, advantages + values[:-1]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (M,) over the rows whose mask (M,) is 1; 0 if there are none."""
    assert x.shape == mask.shape
    return (x * mask).sum() / mask.sum().clamp(min=1)


def normalize(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and (population) standard deviation 1 over the real rows of the minibatch."""
    centred = advantages - masked_mean(advantages, mask)
    return centred / (masked_mean(centred.square(), mask).sqrt() + 1e-8)


def reward_loss(predicted_rewards: Tensor, rewards: Tensor) -> Tensor:
    """ℓ_R(s,a) = |r - R̄(φ(s),a)|, as smooth-L1, per transition: (M,)."""
    return F.smooth_l1_loss(predicted_rewards, rewards, reduction="none")


def transition_loss(predicted_next_z: Tensor, next_z: Tensor) -> Tensor:
    """ℓ_P(s,a,s') = d̄(z', z̄'), z̄' ~ P̄(·|z,a): smooth-L1, summed over the latent, per transition: (M,).

    The talk bounds its Wasserstein distance by E d̄(z', z̄'); smooth-L1 for d̄ is the published choice. z' is not
    detached: φ too is to make the next latent predictable.
    """
    return F.smooth_l1_loss(predicted_next_z.float(), next_z.float(), reduction="none").flatten(1).sum(-1)


def clipped_objective(ratio: Tensor, utility: Tensor, clip_coef: float) -> Tensor:
    """min(r U, clip(r, 1 ± ε) U), per transition: (M,). Gradient flows through r and through U."""
    return torch.min(ratio * utility, ratio.clamp(1 - clip_coef, 1 + clip_coef) * utility)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[return - V] / Var[return] over the real rows: 1 is a perfect critic, 0 one no better than a constant."""
    errors, returns = (returns - values)[mask > 0], returns[mask > 0]
    return 1 - errors.var(correction=0) / returns.var(correction=0)


def compute_loss(
    agent: Agent, batch: Minibatch, z: Tensor, next_z: Tensor | None, noise: Tensor | None, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a minibatch, and what of it is logged, as scalars.

    z, next_z: φ(s) and φ(s') of the M transitions, neither detached; noise: see `TransitionModel.forward`. Without
    next_z the world model is not run, and this is PPO.
    """
    log_probs, values = agent.policy_and_value(z)  # (M, A), (M,)
    log_ratios = log_probs - batch.old_log_probs  # (M, A)
    log_ratio = log_ratios.gather(-1, batch.actions[:, None]).squeeze(-1)  # (M,)
    ratio = log_ratio.exp()

    advantages = normalize(batch.advantages, batch.mask)  # first this, then the losses are subtracted as they are
    utility, additive_loss, world_model_stats = advantages, 0.0, {}
    if next_z is not None:
        l_r = reward_loss(agent.reward_model(z, batch.actions), batch.rewards)  # (M,)
        l_p = transition_loss(agent.transition_model(z, batch.actions, noise), next_z)  # (M,)
        penalty = args.reward_loss_coef * l_r + args.transition_loss_coef * l_p
        if args.loss_placement == "utility":
            utility = advantages - penalty  # U = A - α_R ℓ_R - α_P ℓ_P
        else:
            additive_loss = masked_mean(penalty, batch.mask)  # "Let's just add L_R, L_P to the loss? No, we can't!"
        world_model_stats = {
            "world_model/reward_loss": masked_mean(l_r, batch.mask),
            "world_model/transition_loss": masked_mean(l_p, batch.mask),
            "spi/utility_mean": masked_mean(utility, batch.mask),
            "spi/penalty_mean": masked_mean(penalty, batch.mask),
        }

    policy_loss = -masked_mean(clipped_objective(ratio, utility, args.clip_coef), batch.mask)
    value_loss = 0.5 * masked_mean((values - batch.returns).square(), batch.mask)
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), batch.mask)
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss + additive_loss

    ratios = log_ratios.exp()
    inside = (ratios <= 1 + args.clip_coef) & (ratios >= 1 - args.clip_coef)  # N^C with C = 1 + ε
    real_ratios = torch.where(batch.mask[:, None] > 0, ratios, 1.0)
    stats = {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": masked_mean(ratio - 1 - log_ratio, batch.mask),
        "losses/clipfrac": masked_mean(((ratio - 1).abs() > args.clip_coef).float(), batch.mask),
        **world_model_stats,
        "spi/ratio_min": real_ratios.min(),
        "spi/ratio_max": real_ratios.max(),
        "spi/outside_neighbourhood": 1 - masked_mean(inside.float().mean(-1), batch.mask),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


# ==== 6. Setup ========================================================================================================


def choose_precision(precision: str, device: torch.device) -> str:
    """fp32 or bf16; auto is bf16 only where the hardware computes in it, not where it is emulated."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities()
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"


def make_run_dir(args: Args) -> Path:
    """The run's folder, new unless the run is to be resumed. Raises SystemExit(2) if it cannot be made."""
    run_name = args.run_name or f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.runs_dir) / run_name
    if args.resume:
        return run_dir
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        check(False, "run_name", run_name, f"{run_dir} exists already; a run needs a new folder, or --resume")
    except OSError as error:
        check(False, "runs_dir", args.runs_dir, f"cannot make {run_dir}: {error.strerror}")
    return run_dir


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at any instant, power cuts included, the old or the new one is there. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def as_bytes(state: dict) -> bytes:
    """What torch.save makes of the state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_checkpoint(run_dir: Path, run: dict) -> dict:
    """The state in checkpoint.pt. Raises SystemExit(2) if there is none that the described run can go on from."""
    path = run_dir / "checkpoint.pt"
    check(path.is_file(), "resume", str(run_dir), "has no checkpoint.pt to resume from")
    content = path.read_bytes()
    whole = hashlib.sha256(content[32:]).digest() == content[:32]  # torch.load itself would miss most flipped bits
    check(whole, "resume", str(path), "is damaged, or not a checkpoint: its digest is not that of its content")
    state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
    script = state["run"]["script"]
    check(script == run["script"], "resume", str(path), f"is a checkpoint of {script}")
    may_change = ("total_timesteps", "checkpoint_interval", "resume", "track", "runs_dir", "run_name", "device")
    before, now = (
        {f"--{name.replace('_', '-')}": value for name, value in described["args"].items() if name not in may_change}
        | {"precision": described["precision"], "device is a CPU": described["device"] == "cpu"}
        for described in (state["run"], run)
    )
    changed = [f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now if before.get(name) != now[name]]
    check(not changed, "resume", str(run_dir), f"may not change: {'; '.join(changed)}")
    episodes = run_dir / "episodes.csv"
    short = not episodes.is_file() or episodes.stat().st_size < state["episodes_bytes"]
    check(not short, "resume", str(episodes), "lacks episodes that it had at the checkpoint")
    return state


def catch_signals() -> list[int]:
    """Signals to stop (Ctrl-C, SLURM) in a list that grows as they come; the second of a kind ends the run at once."""
    received = []

    def handler(number: int, _) -> None:
        """Note the signal, and leave the next one of its kind to the system."""
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, handler)
    return received


def describe_run(args: Args, device: torch.device, precision: str) -> dict:
    """All that one must know to repeat the run, or to doubt it."""
    folder = shlex.quote(str(Path(__file__).parent))
    git = f"git -C {folder} describe --always --abbrev=40 --exclude '*' --dirty"  # "<commit>" or "<commit>-dirty"
    git_status, git_commit = subprocess.getstatusoutput(git)
    packages = ("torch", "envpool", "gymnasium", "numpy")
    return {
        "script": Path(__file__).name,
        "script_path": str(Path(__file__).resolve()),
        "args": vars(args),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "torch_threads": torch.get_num_threads(),
        "git_commit": git_commit if git_status == 0 else None,
        "machine": f"{torch.cpu.get_capabilities()['cpu_name']}, {os.cpu_count()} cores, {platform.platform()}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "resumes": [],  # where the run was continued, each time with fresh environments
    }


def stop_run(writer: SummaryWriter, run_dir: Path, weights: dict[str, Tensor], step: int, terms: list[str]) -> None:
    """End a run whose `terms` are not finite, keeping the weights from before that iteration. Raises SystemExit(1)."""
    write_whole(run_dir / "agent.pt", as_bytes(weights))
    writer.close()
    print(f"\nerror: stopped at step {step}: not finite: {', '.join(terms)}", file=sys.stderr)
    print(f"error: {run_dir / 'agent.pt'} has the weights from before this iteration", file=sys.stderr)
    raise SystemExit(1)


def train(args: Args) -> None:
    """One run, from the check of its arguments to its last line of output."""
    check_args(args)
    num_actions, num_inputs = check_env(args.env_id)
    run_dir = make_run_dir(args)
    signals = catch_signals()

    torch.set_num_threads(1)  # layers this small gain nothing from a second, and wait for it where a core is busy
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    precision = choose_precision(args.precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 on CUDA too
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    run, checkpoint = describe_run(args, device, precision), None
    if args.resume:
        checkpoint = load_checkpoint(run_dir, run)
        steps = checkpoint["global_step"]
        if args.total_timesteps < steps + args.num_envs * args.num_steps:
            print(f"{run_dir}: complete, with {steps} steps; --total-timesteps says how many more to make")
            return
        circumstances = ("device", "precision", "torch_threads", "git_commit", "machine", "versions")
        leg = {"global_step": steps} | {name: run[name] for name in circumstances}
        run = checkpoint["run"] | {"args": vars(args), "resumes": [*checkpoint["run"]["resumes"], leg]}
        print(f"{run_dir}: resumed after step {steps}, with fresh environments; open episodes are dropped")
    if args.track:
        import wandb  # optional, and nobody else should have to wait for it

        run["wandb_id"] = run.get("wandb_id") or wandb.util.generate_id()
        name, wandb_id = run_dir.name, run["wandb_id"]
        wandb.init(name=name, id=wandb_id, resume="allow", dir=run_dir, config=run, sync_tensorboard=True)
    write_whole(run_dir / "config.json", (json.dumps(run, indent=2) + "\n").encode())
    # What was logged after the checkpoint is dropped: it is made again.
    writer = SummaryWriter(run_dir, purge_step=checkpoint["global_step"] + 1 if checkpoint else None)
    episodes_file = open(run_dir / "episodes.csv", "a", buffering=1, newline="")  # each line is flushed
    episodes = csv.writer(episodes_file, lineterminator="\n")
    if checkpoint:
        episodes_file.truncate(checkpoint["episodes_bytes"])
    else:
        episodes.writerow(("global_step", "return", "length"))

    T, N, A, L = args.num_steps, args.num_envs, num_actions, args.chunk_length
    M = T * N // args.num_minibatches
    num_iterations = args.total_timesteps // (T * N)
    run_world_model = args.reward_loss_coef > 0 or args.transition_loss_coef > 0

    torch.manual_seed(args.seed)
    # The world model draws from generators of its own, so that the rest of the agent is the baseline's to the last bit.
    init_seed, noise_seed = np.random.SeedSequence([args.seed, 1]).generate_state(2).tolist()
    agent = Agent(num_inputs, A, args.spectral_norm, torch.Generator().manual_seed(init_seed)).to(device)
    noise_rng = torch.Generator(device).manual_seed(noise_seed)
    if args.compile:
        agent.encode = torch.compile(agent.encode)
        agent.reward_model.compile()
        agent.transition_model.compile()
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    obs = torch.zeros((T + 1, N, num_inputs), device=device)
    host_actions = torch.zeros((T, N), dtype=torch.int64)
    log_probs = torch.zeros((T, N, A), device=device)
    values = torch.zeros((T + 1, N), device=device)
    rewards = torch.zeros((T, N), device=device)
    terminated = torch.zeros((T, N), dtype=torch.bool, device=device)
    dones = torch.zeros((T + 1, N), dtype=torch.bool, device=device)  # obs[t] is the last of an episode

    envs = make_envs(args, len(run["resumes"]))
    reward_scaler = RewardScaler(N, args.gamma, device)
    executed, sticky_rng = np.zeros(N, dtype=np.int32), torch.Generator().manual_seed(args.seed)
    episodic_return, episodic_length = np.zeros(N), np.zeros(N, dtype=np.int64)
    recent_returns = deque(maxlen=100)
    obs[T] = to_device(torch.from_numpy(vectorize(envs.reset()[0], num_inputs)), device)
    dummy, done = np.ones(N, dtype=bool), np.zeros(N, dtype=bool)  # the first step is as if after a dummy
    first_iteration, global_step, start_weights, start_time = 0, 0, agent.state_dict(), time.time()
    stateful = {"agent": agent, "optimizer": optimizer, "reward_scaler": reward_scaler}
    generators = [
        torch.default_generator,
        *torch.cuda.default_generators[: device.type == "cuda"],
        noise_rng,
        sticky_rng,
    ]
    if checkpoint:
        for name, module in stateful.items():
            module.load_state_dict(checkpoint[name])
        for generator, generator_state in zip(generators, checkpoint["generators"], strict=True):
            generator.set_state(generator_state)
        recent_returns.extend(checkpoint["recent_returns"])
        first_iteration, global_step = checkpoint["iterations"], checkpoint["global_step"]
        start_time -= checkpoint["seconds"]
    total = num_iterations * T * N
    progress = tqdm(total=total, initial=global_step, unit=" steps", desc=run_dir.name, mininterval=1.0)

    for iteration in range(first_iteration, num_iterations):
        # ==== 7. Rollout ==============================================================================================
        optimizer.param_groups[0]["lr"] = (1 - iteration / num_iterations) * args.learning_rate
        obs[0], dones[0] = obs[T], dones[T]
        for t in range(T):
            with torch.no_grad(), autocast:
                log_probs[t], values[t] = agent.policy_and_value(agent.encode(obs[t]))
                if not log_probs[t].isfinite().all():  # finite parameters can still be too large
                    stop_run(writer, run_dir, start_weights, global_step, ["log_probs"])
                host_actions[t] = torch.multinomial(log_probs[t].exp(), num_samples=1).squeeze(-1)

            # Never in an episode's first step, which comes after a dummy.
            repeat = (torch.rand(N, generator=sticky_rng).numpy() < args.sticky) & ~dummy
            executed = np.where(repeat, executed, host_actions[t].numpy()).astype(np.int32)
            next_obs, reward, ended, truncated, _ = envs.step(executed)
            dummy, done = done, ended | truncated
            # The true s', even where an episode ends.
            obs[t + 1] = to_device(torch.from_numpy(vectorize(next_obs, num_inputs)), device)
            rewards[t] = to_device(torch.from_numpy(reward), device)
            terminated[t] = to_device(torch.from_numpy(ended), device)  # not by the time limit
            dones[t + 1] = to_device(torch.from_numpy(done), device)

            global_step = (iteration * T + t + 1) * N
            episodic_return += reward  # 0 in a dummy row
            episodic_length += ~dummy
            for i in np.flatnonzero(done):
                episodes.writerow((global_step, episodic_return[i], episodic_length[i]))
                writer.add_scalar("charts/episodic_return", episodic_return[i], global_step)
                writer.add_scalar("charts/episodic_length", episodic_length[i], global_step)
                recent_returns.append(episodic_return[i])
            episodic_return[done], episodic_length[done] = 0, 0

        # ==== 8. Advantages ===========================================================================================
        with torch.no_grad(), autocast:
            values[T] = agent.policy_and_value(agent.encode(obs[T]))[1]
        mask = (~dones[:T]).float()  # (T, N)
        scaled_rewards = reward_scaler.scale(rewards, dones)
        advantages, returns = compute_gae(scaled_rewards, values, terminated, dones, args.gamma, args.gae_lambda)
        rollout = Minibatch(to_device(host_actions, device), scaled_rewards, log_probs, advantages, returns, mask)

        # ==== 9. Update ===============================================================================================
        start_weights = {name: weight.clone() for name, weight in agent.state_dict().items()}
        noise = None
        if run_world_model:  # once for all minibatches, as their transitions are shuffled: a CPU takes long to draw it
            noise = torch.randn((M, *agent.transition_model.noise_shape), device=device, generator=noise_rng).to(dtype)
        minibatch_stats = []
        for _ in range(args.update_epochs):
            for chunks in torch.randperm(N * T // L).chunk(args.num_minibatches):
                # A chunk is L steps of one environment. Its L + 1 frames are encoded once, as s and as the last s'.
                t = chunks[:, None] // N * L + torch.arange(L + run_world_model)
                rows = to_device(t * N + chunks[:, None] % N, device)  # (chunks, L + 1), of the (T + 1) N frames
                batch = Minibatch(*(x.flatten(0, 1)[rows[:, :L].flatten()] for x in rollout))
                with autocast:
                    frames_z = agent.encode(obs.flatten(0, 1).index_select(0, rows.flatten())).unflatten(0, rows.shape)
                    z = frames_z[:, :L].flatten(0, 1)
                    next_z = frames_z[:, 1:].flatten(0, 1) if run_world_model else None
                    loss, stats = compute_loss(agent, batch, z, next_z, noise, args)
                optimizer.zero_grad()
                loss.backward()
                stats["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                minibatch_stats.append(torch.stack(list(stats.values())))

        # ==== 10. Logging =============================================================================================
        table = torch.stack(minibatch_stats).cpu()  # (minibatches, metrics); here the update waits for the device
        diagnostic = torch.tensor([name.startswith("spi/") for name in stats])  # a ratio may overflow, and harm nothing
        not_finite = ~table.isfinite() & ~diagnostic
        if not_finite.any():
            first = not_finite[not_finite.any(-1)][0]
            terms = [name for name, bad in zip(stats, first, strict=True) if bad]
            stop_run(writer, run_dir, start_weights, global_step, terms)
        finite = torch.stack([parameter.isfinite().all() for parameter in agent.parameters()]).cpu()
        if not finite.all():  # after the last step, which no loss has seen
            terms = [name for (name, _), fine in zip(agent.named_parameters(), finite, strict=True) if not fine]
            stop_run(writer, run_dir, start_weights, global_step, terms)
        metrics = dict(zip(stats, table.mean(0).tolist(), strict=True))
        last_epoch = dict(zip(stats, table[-args.num_minibatches :].unbind(-1), strict=True))
        metrics["spi/ratio_min"] = last_epoch["spi/ratio_min"].min().item()
        metrics["spi/ratio_max"] = last_epoch["spi/ratio_max"].max().item()
        metrics["spi/outside_neighbourhood"] = last_epoch["spi/outside_neighbourhood"].mean().item()
        metrics["losses/explained_variance"] = explained_variance(values[:T], returns, mask).item()
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = global_step / (time.time() - start_time)
        for name, value in metrics.items():
            writer.add_scalar(name, value, global_step)
        mean_return = f"{np.mean(recent_returns):.2f}" if recent_returns else "no episode yet"
        progress.set_postfix_str(f"return {mean_return}, SPS {metrics['charts/SPS']:.0f}", refresh=False)
        progress.update(T * N)

        last, stopping = iteration + 1 == num_iterations, bool(signals)
        if last or stopping or (iteration + 1) % args.checkpoint_interval == 0:
            with torch.no_grad(), autocast:
                if not agent.policy_and_value(agent.encode(obs[T]))[0].isfinite().all():
                    stop_run(writer, run_dir, start_weights, global_step, ["log_probs"])
            if last:  # before the checkpoint, which says that all is done
                write_whole(run_dir / "agent.pt", as_bytes(agent.state_dict()))
            writer.flush()
            os.fsync(episodes_file.fileno())
            state = {name: module.state_dict() for name, module in stateful.items()}
            state |= {
                "run": run,
                "iterations": iteration + 1,
                "global_step": global_step,
                "seconds": time.time() - start_time,
                "generators": [generator.get_state() for generator in generators],
                "recent_returns": [float(value) for value in recent_returns],
                "episodes_bytes": (run_dir / "episodes.csv").stat().st_size,
            }
            content = as_bytes(state)
            write_whole(run_dir / "checkpoint.pt", hashlib.sha256(content).digest() + content)
        if stopping and not last:
            break

    progress.close()
    episodes_file.close()
    writer.close()
    if not last:
        missing = [] if args.resume else ["--run-name", run_dir.name, "--resume"] if not args.run_name else ["--resume"]
        print(f"stopped by {signal.Signals(signals[0]).name} after step {global_step}; to go on:", file=sys.stderr)
        print(shlex.join([sys.executable, *sys.argv, *missing]), file=sys.stderr)
        raise SystemExit(75)
    sps, minutes = metrics["charts/SPS"], (time.time() - start_time) / 60
    print(f"{args.env_id}: mean return of the last {len(recent_returns)} episodes: {mean_return}")
    print(f"{global_step:,} steps at {sps:,.0f} per second, {minutes:.1f} minutes on {run['device']} in {precision}")
    print(f"{run_dir}: config.json, episodes.csv, agent.pt; curves: tensorboard --logdir {args.runs_dir}")


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's thread: its error is raised again here, and told below
    try:
        train(tyro.cli(Args, description=__doc__))
    except OSError as error:  # a full disk, say: what was written before stays, and the last checkpoint is whole
        sys.exit(f"\nerror: {error}")
