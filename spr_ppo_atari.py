# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "envpool==1.2.5", "gymnasium==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "scipy==1.17.1"]
# ///
"""SPR on PPO, Atari: predict your own latent, up to K = 5 steps ahead (Schwarzer et al., ICLR 2021).

    python spr_ppo_atari.py --env-id Pong-v5               # 10 M agent steps, stochastic setting of Deep SPI's paper

    ℓ_SPR(t) = Σ_k m_{t,k} (1 - cos(q(g(ẑ_{t+k})), g̃(z̃_{t+k}))),    ẑ_{t+k} = h(ẑ_{t+k-1}, a_{t+k-1}),    ẑ_t = φ(s_t)
    loss     = PPO's + α E[ℓ_SPR] (additive, published), or α ℓ_SPR inside its clip: U = A - α ℓ_SPR (utility)

    φ  encoder, renormalised    h  transition_model     g  fc, also the head's first layer     q  predictor
    z  its latent               ẑ  predicted            g̃, z̃  of the target, a copy of the agent that follows it
    α  spr_loss_coef            m  1 where t + k is in the chunk and the episode of t

Published on Rainbow, off-policy; the port to PPO is ours, with its siblings' settings. Of such losses the talk on Deep
SPI says "Let's just add L_R, L_P to the loss? No, we can't!": `--loss-placement` asks it here. Diff me against
`deep_spi_ppo_atari.py`. Coefficient 0: `ppo_baseline.py` with renormalised latents, bit for bit on a CPU in float32.
"""

import copy
import ctypes
import difflib
import fcntl
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import envpool
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
CPU = torch.cpu.get_capabilities()
HAS_BF16 = torch.cuda.is_available() or CPU.get("amx_bf16") or CPU.get("avx512_bf16")  # old GPUs emulate it
ATARI = [name for name, spec in envpool.registration.registry.specs.items() if spec[0] == "envpool.atari"]


@dataclass
class Args:
    # ---- Experiment
    seed: int = 1  # seed of the environments, the networks and every random draw
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where the networks live
    precision: Literal["fp32", "bf16"] = "bf16" if HAS_BF16 else "fp32"  # of the networks; weights stay fp32
    run_dir: str = ""  # the run's folder; a run stopped there goes on (default: runs/<env>__<script>__<seed>__<time>)
    checkpoint_interval: int = 100  # iterations from one checkpoint to the next
    track: bool = False  # also log to Weights & Biases (pip install wandb; WANDB_PROJECT and WANDB_ENTITY say where)

    # ---- Environment
    env_id: str = "Pong-v5"  # EnvPool id of the Atari game
    total_timesteps: int = 10_000_000  # agent steps in all, rounded down to whole rollouts (1 agent step = 4 frames)
    num_envs: int = 128  # N, parallel environments
    num_steps: int = 8  # T, steps of each environment per iteration
    repeat_action_probability: float = 0.3  # sticky actions: probability that the last action is repeated instead
    noop_max: int = 60  # a game, and each life, starts with 1 to this many no-ops, the last FIRE where games have it

    # ---- PPO
    learning_rate: float = 2.5e-4  # Adam's step size, annealed linearly to 0
    gamma: float = 0.99  # γ, discount factor
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over the rollout per iteration
    chunk_length: int = 8  # L, consecutive steps of one environment sampled together (1: single steps, as published)
    clip_coef: float = 0.1  # ε of the clip; the neighbourhood's C is 1 + ε
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient, over all parameters together

    # ---- SPR
    spr_loss_coef: float = 2.0  # α, weight of the loss; each of the K steps adds 1 - cos to it
    augmentation: bool = True  # shift and brighten the frames of the loss; without: dropout in φ, and a slow target
    loss_placement: Literal["utility", "additive", "gated"] = "additive"  # in U; beside J; in U where no clip is active

    def __post_init__(self):
        """Refuse what cannot work, in one line. Raises SystemExit(2), as for every usage error."""
        for name, kind in ((field.name, field.type) for field in fields(self) if field.type in (int, float)):
            least = 0 if name == "seed" or kind is float else 1
            self.check(name, least <= getattr(self, name) < np.inf, f"must be finite and at least {least}")
        for name in ("repeat_action_probability", "gamma", "gae_lambda"):
            self.check(name, getattr(self, name) <= 1, "must lie in [0, 1]")
        for name in ("learning_rate", "max_grad_norm"):
            self.check(name, getattr(self, name) > 0, "must be positive")
        self.check("seed", self.seed < 2**63, "must be below 2^63")
        self.check("noop_max", self.noop_max <= 10_000, "must be at most 10,000: a start plays up to so many frames")
        self.check("clip_coef", 0 < self.clip_coef < 1, "must lie in (0, 1), so that 1 < C < 2")
        rollout, chunks = self.num_envs * self.num_steps, self.num_envs * self.num_steps // self.chunk_length
        self.check("total_timesteps", self.total_timesteps >= rollout, f"must be at least one rollout, {rollout}")
        self.check("chunk_length", self.num_steps % self.chunk_length == 0, f"must divide num_steps = {self.num_steps}")
        self.check("num_minibatches", chunks % self.num_minibatches == 0, f"must divide the rollout's {chunks} chunks")
        self.check("device", self.device != "cuda" or torch.cuda.is_available(), "this machine has no CUDA device")
        has_wandb = getattr(importlib.util.find_spec("wandb"), "origin", None)  # its log folder wandb/ has none
        self.check("track", not self.track or has_wandb, "needs wandb: pip install wandb")
        closest = ", ".join(difflib.get_close_matches(self.env_id, ATARI, cutoff=0))
        self.check("env_id", self.env_id in ATARI, f"must be an Atari game of EnvPool, such as {closest}")

    def check(self, name: str, allowed: object, rule: str) -> None:
        """Exit with one line on stderr unless the field is allowed."""
        if not allowed:
            print(f"error: --{name.replace('_', '-')}: got {getattr(self, name)!r}; {rule}", file=sys.stderr)
            raise SystemExit(2)


# ==== 2. Environment ==================================================================================================


class Games:
    """N parallel games, and the return and length of the episode that each is in."""

    def __init__(self, args: Args, start: int = 0):
        # EnvPool's own seeds are seed + i: neighbouring seeds would share games. A run that goes on plays new ones.
        stream = np.random.SeedSequence(args.seed, spawn_key=(start,) if start else ())
        self.envs = envpool.make(
            args.env_id,
            env_type="gymnasium",
            num_envs=args.num_envs,
            num_threads=min(args.num_envs, torch.get_num_threads()),  # EnvPool and torch take turns
            env_seed=(stream.generate_state(args.num_envs) >> 1).tolist(),  # signed 32 bits
            episodic_life=True,
            repeat_action_probability=args.repeat_action_probability,
            noop_max=args.noop_max,
        )
        self.num_actions = int(self.envs.action_space.n)
        self.is_last = np.zeros(args.num_envs, dtype=bool)
        self.lives, self.life_lost = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=bool)
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)

    def reset(self) -> Tensor:
        """First observations, each the last 4 frames, (N, 84, 84, 4) uint8: channels last is faster."""
        return torch.from_numpy(self.envs.reset()[0]).permute(0, 2, 3, 1)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[int, tuple[float, int]]]:
        """s', reward, is_terminal, is_last, (N, ...) each; and the episodes that ended: environment -> return, length.

        s' is the true next frame even at an end, where the next step only resets: a dummy row, of reward 0. To the
        learner rewards are clipped, a lost life is a terminal state, and the time limit is not. An episode is a whole
        game, its return unclipped; it lacks what was scored in the no-ops after a lost life: docs/environments.md.
        """
        frames, rewards, terminated, truncated, info = self.envs.step(actions.numpy().astype(np.int32))
        # The reset after a lost life plays no-ops. If they end the game no flag says so, but lives rise to the next's.
        untold = self.life_lost & (info["lives"] > self.lives)
        over = (terminated & info["terminated"].astype(bool)) | truncated  # info's is the game's
        self.returns += info["reward"]
        self.lengths += ~self.is_last
        self.is_last, self.lives, self.life_lost = terminated | truncated, info["lives"], terminated & ~over
        episodes = {int(i): (float(self.returns[i]), int(self.lengths[i])) for i in np.flatnonzero(over | untold)}
        self.returns[over | untold], self.lengths[over | untold] = 0, 0
        frames, *others = map(torch.from_numpy, (frames, np.sign(rewards), terminated, self.is_last))
        return frames.permute(0, 2, 3, 1), *others, episodes


# ==== 3. Networks =====================================================================================================
# B rows, A actions. The latent z = φ(s) is (B, height, width, channels): with this encoder (B, 7, 7, 64).


def layer_init(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """Orthogonal weights of this gain, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def renormalize(z: Tensor) -> Tensor:
    """(z - min) / (max - min) of each row, over its whole latent (B, h, w, C); a constant one becomes 0."""
    low, high = z.amin((1, 2, 3), keepdim=True), z.amax((1, 2, 3), keepdim=True)
    return (z - low) / (high - low).clamp(min=1e-5)


class TransitionModel(nn.Module):
    """h(z, a): the next latent, renormalised. Only the loss runs it: BatchNorm enters no acting."""

    def __init__(self, latent_shape: tuple[int, int, int], num_actions: int):
        super().__init__()
        C, self.A = latent_shape[-1], num_actions
        self.layers = nn.Sequential(
            nn.Conv2d(C + num_actions, C, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(C),  # its statistics are of every row, as published: also of those that the loss masks
            nn.Conv2d(C, C, 3, padding=1),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, actions: Tensor) -> Tensor:
        """Predicted next latents (B, h, w, C), for z (B, h, w, C) and actions (B,)."""
        planes = F.one_hot(actions, self.A).to(z.dtype)[:, None, None].expand(*z.shape[:3], self.A)
        x = self.layers(torch.cat((z, planes), dim=-1).permute(0, 3, 1, 2))
        return renormalize(x.permute(0, 2, 3, 1))


class Agent(nn.Module):
    """π = π̄∘φ and its critic, with h and q, which look ahead with the same φ."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.encoder = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)
        with torch.no_grad():
            latent_shape = self.encode(torch.zeros(1, 84, 84, 4, dtype=torch.uint8)).shape[1:]
        self.fc = layer_init(nn.Linear(latent_shape.numel(), 512))
        self.actor = layer_init(nn.Linear(512, num_actions), gain=0.01)
        self.critic = layer_init(nn.Linear(512, 1), gain=1.0)
        with torch.random.fork_rng(devices=()):  # so that all else is drawn as in the baseline, to the last bit
            self.transition_model = TransitionModel(latent_shape, num_actions)
            self.predictor = nn.Linear(512, 512)

    def encode(self, obs: Tensor, dropout: torch.Generator | None = None) -> Tensor:
        """z = φ(s), (B, height, width, channels), of frames (B, 84, 84, 4); with a generator, dropout in each layer."""
        first, bf16 = self.encoder[0], torch.is_autocast_enabled(obs.device.type)
        frames = obs.permute(0, 3, 1, 2).to(torch.bfloat16 if bf16 else torch.float32)
        x = first._conv_forward(frames, first.weight / 255, first.bias)  # as of frames / 255, but weights are fewer
        for layer in self.encoder[1:]:
            x = layer(x)
            if dropout and isinstance(layer, nn.ReLU):
                x = 2 * x * torch.empty_like(x).bernoulli_(0.5, generator=dropout)
        return renormalize(x.permute(0, 2, 3, 1))

    def policy_and_value(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, A) of every action, and the value (B,), of latents z."""
        hidden = F.relu(self.fc(z.flatten(1)))
        return self.actor(hidden).float().log_softmax(-1), self.critic(hidden).float().squeeze(-1)


# ==== 4. Equations ====================================================================================================
# T steps, N environments, M rows of a minibatch, A actions. A row is a transition (s, a, s'). Where s is already the
# last of an episode the row is an auto-reset dummy, not a transition: its mask is 0 and it counts nowhere.

K = 5  # steps that are predicted ahead, or as many as a chunk has


class Transitions(NamedTuple):
    """The M transitions of a minibatch: M/L chunks of L steps, row after row."""

    obs: Tensor  # (M/L, L + 1, 84, 84, 4) the frames s, and the last s'; without a world model (M/L, L, ...)
    actions: Tensor  # (M,) int64
    rewards: Tensor  # (M,) clipped
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


@torch.no_grad()
def follow(target: Agent, agent: Agent, rate: float) -> None:
    """Move the target's weights θ̃ towards the agent's θ, to θ̃ + rate (θ - θ̃). Of the target, φ and g are used."""
    for old, new in zip(target.parameters(), agent.parameters(), strict=True):
        old.lerp_(new, rate)


def augment(frames: Tensor, noise: torch.Generator) -> Tensor:
    """Films (B, 84, 84, 4) uint8, each shifted by up to 4 pixels (edges repeat) and up to 10 % brighter or darker."""
    B, size, device = len(frames), frames.shape[1], frames.device
    shifts = torch.randint(-4, 5, (2, B, 1), generator=noise, device=device)
    y, x = (torch.arange(size, device=device) + shifts).clamp(0, size - 1)  # (B, 84) each
    pixels = (torch.arange(B, device=device)[:, None, None] * size + y[:, :, None]) * size + x[:, None]  # (B, 84, 84)
    shifted = frames.view(torch.int32).take(pixels).view(torch.uint8).view(frames.shape)  # 4 frames as one number: fast
    brightness = 1 + 0.05 * torch.randn(B, 1, 1, 1, generator=noise, device=device).clamp(-2, 2)
    return shifted * brightness.to(torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32)


def look_ahead(agent: Agent, target: Agent, batch: Transitions, augmentation: bool, noise: torch.Generator) -> tuple:
    """Of B chunks: for each k, q(g(ẑ_{t+k})), (B, L - k + 1, 512), up to the last s'; targets g̃(z̃), (B, L + 1, 512)."""

    def view(who: Agent, obs: Tensor) -> Tensor:
        """Latents of frames (B, n, ...) as the loss sees them, each time others: augmented, or with dropout in φ."""
        frames = obs.flatten(0, 1)
        z = who.encode(augment(frames, noise)) if augmentation else who.encode(frames, dropout=noise)
        return z.unflatten(0, obs.shape[:2])

    B, L = len(batch.obs), batch.obs.shape[1] - 1
    with torch.no_grad():
        targets = target.fc(view(target, batch.obs).flatten(2))
    z, actions, predictions = view(agent, batch.obs[:, :L]), batch.actions.view(B, L), []
    for k in range(1, min(K, L) + 1):  # z becomes ẑ_{t+k}, without those beyond the chunk
        z = agent.transition_model(z[:, : L - k + 1].flatten(0, 1), actions[:, k - 1 :].flatten()).unflatten(0, (B, -1))
        predictions.append(agent.predictor(agent.fc(z.flatten(2))))
    return predictions, targets


def spr_loss(predictions: list[Tensor], targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """ℓ_SPR(t) = Σ_k m_{t,k} (1 - cos(q(g(ẑ_{t+k})), g̃(z̃_{t+k}))), and Σ_k m_{t,k}, per transition: (M,).

    m_{t,k} = 1 if the steps from t to t + k are all real and in the chunk: an episode's last step is predicted, nothing
    beyond it is. A row late in its chunk has less to predict: less loss, more utility. Through BatchNorm its loss pulls
    on all rows. (The paper has -cos; the authors' code the squared distance, which is 2 (1 - cos): hence α = 2.)
    """
    mask = mask.view(len(targets), -1)  # (B, L)
    loss, pairs, real = torch.zeros_like(mask), torch.zeros_like(mask), mask
    for k, prediction in enumerate(predictions, start=1):
        x, y = (F.normalize(v.float(), dim=-1, eps=1e-3) for v in (prediction, targets[:, k:]))
        real = real[:, : x.shape[1]] * mask[:, k - 1 :]  # m_{t,k}, (B, L - k + 1)
        loss = loss + F.pad(real * (1 - (x * y).sum(-1)), (0, k - 1))
        pairs = pairs + F.pad(real, (0, k - 1))
    return loss.flatten(), pairs.flatten()


def clipped_objective(ratio: Tensor, utility: Tensor, clip_coef: float) -> Tensor:
    """min(r U, clip(r, 1 ± ε) U), per transition: (M,). Gradient flows through r, and through U if it has one."""
    return torch.min(ratio * utility, ratio.clamp(1 - clip_coef, 1 + clip_coef) * utility)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[return - V] / Var[return] over the real rows: 1 is perfect, 0 no better than a constant."""
    returns = returns.double()  # so that the variance of constants is exactly 0
    errors, variance = (masked_mean((x - masked_mean(x, mask)).square(), mask) for x in (returns - values, returns))
    return torch.where(variance > 0, 1 - errors / variance, 0.0)


@torch.no_grad()
def what_the_model_knows(z: Tensor, predictions: list[Tensor], targets: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """ℓ_SPR beside that of the target at t for every k (in another view), and of the mean target; variance of z."""
    z, share = z.float().flatten(1), mask[:, None] / mask.sum().clamp(min=1)
    copies = [targets[:, : x.shape[1]] for x in predictions]
    means = [targets.mean((0, 1)).expand_as(x) for x in predictions]
    (loss, pairs), (copy_loss, _), (mean_loss, _) = (spr_loss(x, targets, mask) for x in (predictions, copies, means))
    return {
        "world_model/spr_loss": masked_mean(loss, mask),
        "world_model/spr_loss_copy": masked_mean(copy_loss, mask),
        "world_model/spr_loss_mean": masked_mean(mean_loss, mask),
        "world_model/masked_share": 1 - pairs.mean() / K,  # of the pairs (t, k)
        "world_model/latent_variance": ((z - (z * share).sum(0)).square() * share).sum(0).mean(),
    }


def compute_loss(
    agent: Agent, batch: Transitions, args: Args, noise: torch.Generator | None, target: Agent
) -> tuple[Tensor, dict]:
    """The loss of a minibatch, and what of it is logged. Without noise there is no ℓ_SPR: this is PPO."""
    length = len(batch.actions) // len(batch.obs)
    z = agent.encode(batch.obs[:, :length].flatten(0, 1))  # frames as they are: augmented, r would not start at 1
    log_probs, values = agent.policy_and_value(z)  # (M, A), (M,)
    log_ratios = log_probs - batch.old_log_probs  # (M, A)
    log_ratio = log_ratios.gather(-1, batch.actions[:, None]).squeeze(-1)  # (M,)
    ratio = log_ratio.exp()

    advantages = normalize(batch.advantages, batch.mask)  # of A, not of the loss
    utility, additive_loss, world_model_stats = advantages, 0.0, {}
    if noise is not None:
        predictions, targets = look_ahead(agent, target, batch, args.augmentation, noise)
        l_spr, _ = spr_loss(predictions, targets, batch.mask)  # (M,)
        penalty = args.spr_loss_coef * l_spr
        utility = advantages - penalty  # U = A - α ℓ_SPR
        if args.loss_placement == "additive":  # as published
            utility, additive_loss = advantages, masked_mean(penalty, batch.mask)
        if args.loss_placement == "gated":  # in a row where the clip is active, the loss pulls no more either
            is_clipped = clipped_objective(ratio, utility, args.clip_coef) < ratio * utility
            utility = torch.where(is_clipped, utility.detach(), utility)
        world_model_stats = {
            **what_the_model_knows(z, predictions, targets, batch.mask),
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
        "spi/ratios": ratios,
        "spi/outside_neighbourhood": masked_mean(outside.float().mean(-1), batch.mask),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


# ==== 5. Training =====================================================================================================


def train(args: Args) -> None:
    """Play a rollout, estimate its advantages, learn from it; again and again."""
    T, N, L = args.num_steps, args.num_envs, args.chunk_length
    run_world_model = args.spr_loss_coef > 0
    run, num_iterations = Run(args), args.total_timesteps // (T * N)
    device, autocast = args.device, torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")

    torch.manual_seed(args.seed)
    games = Games(args, run.iterations)
    agent = Agent(games.num_actions).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    target = copy.deepcopy(agent).requires_grad_(False)
    learned = {"agent": agent, "optimizer": optimizer, "target": target}
    if run.state:
        torch.set_rng_state(run.state["rng"])
        for name, part in learned.items():
            part.load_state_dict(run.state[name])

    # Frames, policies and values live on the device; the rest, like the games, on the CPU.
    obs = torch.zeros((T + 1, N, 84, 84, 4), dtype=torch.uint8, device=device)
    log_probs = torch.zeros((T, N, games.num_actions), device=device)
    values = torch.zeros((T + 1, N), device=device)
    actions = torch.zeros((T, N), dtype=torch.int64)
    rewards = torch.zeros((T, N))
    is_terminal, is_last = torch.zeros((2, T + 1, N), dtype=torch.bool)  # obs[t]: its value is 0; it ends an episode
    obs[T] = games.reset()

    for iteration in range(run.iterations, num_iterations):
        # ---- Rollout
        optimizer.param_groups[0]["lr"] = (1 - iteration / num_iterations) * args.learning_rate
        obs[0], is_last[0] = obs[T], is_last[T]  # is_terminal[0] is never read
        for t in range(T):
            with torch.no_grad(), autocast:
                log_probs[t], values[t] = agent.policy_and_value(agent.encode(obs[t]))
            if not log_probs[t].isfinite().all():
                raise FloatingPointError("not finite: log_probs")
            actions[t] = torch.multinomial(log_probs[t].exp().cpu(), num_samples=1).squeeze(-1)
            obs[t + 1], rewards[t], is_terminal[t + 1], is_last[t + 1], episodes = games.step(actions[t])
            run.log_episodes((iteration * T + t + 1) * N, episodes)

        # ---- Advantages
        with torch.no_grad(), autocast:
            values[T] = agent.policy_and_value(agent.encode(obs[T]))[1]
        advantages, returns = compute_gae(rewards, values.cpu(), is_terminal, is_last, args.gamma, args.gae_lambda)
        mask = (~is_last[:T]).float()
        of_steps = [x.to(device) for x in (actions, rewards, log_probs, advantages, returns, mask)]  # as in Transitions

        # ---- Update
        noise = None
        if run_world_model:  # on the device, but seeded from the CPU's generator, whose state is in the checkpoint
            noise = torch.Generator(device).manual_seed(torch.randint(2**63 - 1, ()).item())
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
                    loss, stats = compute_loss(agent, batch, args, noise, target)
                optimizer.zero_grad()
                loss.backward()
                stats["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                follow(target, agent, rate=1.0 if args.augmentation else 0.01)
                epoch_stats.append(stats)

        # ---- Logging: losses of the last epoch
        table = {name: torch.stack([row[name] for row in epoch_stats]) for name in stats}
        ratios = table.pop("spi/ratios", torch.ones(1)).cpu()
        metrics = {name: column.mean().item() for name, column in table.items()}
        metrics["spi/ratio_min"], metrics["spi/ratio_max"] = ratios.min().item(), ratios.max().item()
        metrics["losses/explained_variance"] = explained_variance(values[:T].cpu(), returns, mask).item()
        metrics["losses/weight_norm"] = nn.utils.get_total_norm(agent.parameters()).item()
        with torch.no_grad(), autocast:  # the weights after the last step, which no loss has seen, may be too large
            if not all(x.isfinite().all() for x in agent.policy_and_value(agent.encode(obs[T, :1]))):
                raise FloatingPointError("not finite: log_probs or value, after the update")
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
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
        if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # keep freed memory: the system would have to zero it anew
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD

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
