"""DreamSPI on Atari: planning in a world model that PPO's clip keeps honest (Delgrange, Avalos and Röpke, ICLR 2026).

    python dream_spi_atari.py --env-id Pong-v5             # 10 M agent steps, stochastic setting of the paper

Two updates an iteration, of parts that share no parameter. The actor never sees a gradient from real data:

    1. real data trains φ and the world model    U = A - α_R ℓ_R - α_P ℓ_P,  J = E[ min( r U, clip(r, 1 ± ε) U ) ]
       Actor and critic stand still: r measures what the move of φ alone does to the policy, and the clip bounds it.
    2. imagination trains actor and critic       H steps from each z = φ(s), with P̄, R̄ and the done model: PPO on them

    φ  encode             R̄  reward_model        ℓ_R  reward_loss + done_loss     α_R  reward_loss_coef
    z  V x C classes      P̄  transition_model    ℓ_P  transition_loss             α_P  transition_loss_coef
    H  horizon            N^C neighbourhood: 2 - C <= π̄'(a|z)/π̄(a|z) <= C; the planning theorem wants C = 1/γ

    V(π̄∘φ) - V(π̄_b∘φ) >= V̄(π̄) - V̄(π̄_b) - ζ,   ζ ∝ L_R/γ + K_V L_P:   better in the model is better, less ζ

Diff me against `deep_spi_ppo_atari.py`, where one update trains all. `dream_spi.py` is for vectors. The published code
does several things otherwise: docs/dreamspi.md lists them. Learns less than Deep SPI, as the authors say of theirs.
"""

import ctypes
import difflib
import fcntl
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from collections import deque
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

ATARI = [name for name, spec in envpool.registration.registry.specs.items() if spec[0] == "envpool.atari"]


@dataclass
class Args:
    # ---- Experiment
    seed: int = 1  # seed of the environments, the networks and every random draw
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks live; auto takes CUDA if present
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the networks; auto: bf16 where the hardware has it
    run_dir: str = ""  # the run's folder; a run stopped there goes on (default: runs/<env>__<script>__<seed>__<time>)
    checkpoint_interval: int = 100  # iterations from one checkpoint to the next
    track: bool = False  # also log to Weights & Biases (pip install wandb; WANDB_PROJECT and WANDB_ENTITY say where)

    # ---- Environment
    env_id: str = "Pong-v5"  # EnvPool id of the Atari game
    total_timesteps: int = 10_000_000  # agent steps in all, rounded down to whole rollouts (1 agent step = 4 frames)
    num_envs: int = 128  # N, parallel environments
    num_steps: int = 8  # T, steps of each environment per iteration
    repeat_action_probability: float = 0.3  # sticky actions: that the game repeats the last action, not the one chosen
    noop_max: int = 60  # a game starts with a random number of no-ops, from 1 to this many

    # ---- Both updates
    gamma: float = 0.99  # γ, discount factor; the planning theorem's neighbourhood is N^{1/γ}
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient, of each part by itself

    # ---- Real data: φ and the world model
    learning_rate: float = 2e-4  # Adam's step size of the encoder and of the world model, annealed linearly to 0
    num_minibatches: int = 4  # minibatches per epoch; per epoch and imagined step in imagination
    update_epochs: int = 4  # passes over the rollout per iteration
    chunk_length: int = 8  # L, consecutive steps of one environment sampled together (1: single steps, as published)
    clip_coef: float = 0.1  # ε of the clip that holds φ in the neighbourhood
    reward_loss_coef: float = 0.01  # α_R, weight of the reward loss, the done loss included
    transition_loss_coef: float = 0.0005  # α_P, weight of the transition loss

    # ---- Imagination: actor and critic
    behaviour_learning_rate: float = 2.75e-5  # Adam's step size of the actor and of the critic, annealed linearly to 0
    horizon: int = 8  # H, imagined steps from each start
    imagination_starts: int = 0  # B, rows of the rollout to start from, drawn in each iteration (0: all of them)
    imagination_epochs: int = 1  # passes over what is imagined per iteration
    imagination_clip_coef: float = 0.1  # ε of the clip that holds the actor; 1/γ - 1 is the planning theorem's

    def __post_init__(self):
        """Refuse what cannot work, in one line. Raises SystemExit(2), as for every usage error."""
        for name in (field.name for field in fields(self) if field.type in (int, float)):
            least = 0 if name in ("seed", "imagination_starts") or type(getattr(self, name)) is float else 1
            self.check(name, least <= getattr(self, name) < math.inf, f"must be finite and at least {least}")
        for name in ("repeat_action_probability", "gamma", "gae_lambda"):
            self.check(name, getattr(self, name) <= 1, "must lie in [0, 1]")
        for name in ("learning_rate", "behaviour_learning_rate", "gamma", "max_grad_norm"):
            self.check(name, getattr(self, name) > 0, "must be positive")
        self.check("seed", self.seed < 2**63, "must be below 2^63")
        self.check("noop_max", self.noop_max <= 10_000, "must be at most 10,000: every start plays so many frames")
        for name in ("clip_coef", "imagination_clip_coef"):
            self.check(name, 0 < getattr(self, name) < 1, "must lie in (0, 1), so that 1 < C < 2")
        rollout, chunks = self.num_envs * self.num_steps, self.num_envs * self.num_steps // self.chunk_length
        self.check("total_timesteps", self.total_timesteps >= rollout, f"must be at least one rollout, {rollout}")
        self.check("chunk_length", self.num_steps % self.chunk_length == 0, f"must divide num_steps = {self.num_steps}")
        self.check("num_minibatches", chunks % self.num_minibatches == 0, f"must divide the rollout's {chunks} chunks")
        starts, minibatches = self.imagination_starts or rollout, self.num_minibatches
        self.check("imagination_starts", starts <= rollout, f"must be at most one rollout, {rollout}")
        self.check("imagination_starts", starts % minibatches == 0, f"must be a multiple of {minibatches} minibatches")
        self.check("device", self.device != "cuda" or torch.cuda.is_available(), "this machine has no CUDA device")
        self.check("track", not self.track or importlib.util.find_spec("wandb"), "needs wandb: pip install wandb")
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
        """First frames (N, 84, 84, 4) uint8: channels last, as convolutions are faster so."""
        return torch.from_numpy(self.envs.reset()[0]).permute(0, 2, 3, 1)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[int, tuple[float, int]]]:
        """s', reward, is_terminal, is_last, (N, ...) each; and the episodes that ended: environment -> return, length.

        s' is the true next frame even at an end, where the next step only resets: a dummy row, of reward 0. To the
        learner rewards are clipped, a lost life is a terminal state, and the time limit is none. An episode is a whole
        game, its return unclipped; it lacks what was scored in the no-ops after a lost life: docs/environments.md.
        """
        frames, rewards, terminated, truncated, info = self.envs.step(actions.numpy().astype(np.int32))
        # After a lost life the game goes on for some no-ops. If it ends in them, only the lives of the next one tell.
        untold = self.life_lost & (info["lives"] > self.lives)
        over = info["terminated"].astype(bool) | truncated
        self.returns += info["reward"]
        self.lengths += ~self.is_last
        self.is_last, self.lives, self.life_lost = terminated | truncated, info["lives"], terminated & ~over
        episodes = {int(i): (float(self.returns[i]), int(self.lengths[i])) for i in np.flatnonzero(over | untold)}
        self.returns[over | untold], self.lengths[over | untold] = 0, 0
        frames, *others = map(torch.from_numpy, (frames, np.sign(rewards), terminated, self.is_last))
        return frames.permute(0, 2, 3, 1), *others, episodes


# ==== 3. Networks =====================================================================================================
# B rows, A actions. The latent z = φ(s) is V = 32 variables of C = 32 classes each: (B, V, C), one-hot.

NUM_VARIABLES, NUM_CLASSES = 32, 32


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights of gain `std`, zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def lecun_linear(num_inputs: int, num_outputs: int) -> nn.Linear:
    """A layer with normal weights of variance 1/inputs, whose tails are cut at 2 std and made up for; zero biases."""
    layer = nn.Linear(num_inputs, num_outputs)
    std = math.sqrt(1 / num_inputs) / 0.87962566
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)
    return layer


def lecun_mlp(num_inputs: int, num_outputs: int) -> nn.Sequential:
    """What the world model is made of: one hidden layer of 512."""
    return nn.Sequential(lecun_linear(num_inputs, 512), nn.ReLU(), lecun_linear(512, num_outputs))


def one_hot_sample(logits: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """One-hot argmax of logits + noise (B, V, C): with Gumbel noise a sample of p, without it the likeliest classes.

    Its gradient is that of p ("straight-through"); its value is one-hot to the last bit.
    """
    p = logits.softmax(-1)
    return F.one_hot((logits + noise).argmax(-1), logits.shape[-1]) + (p - p.detach())


def embed(z: Tensor, table: nn.Embedding) -> Tensor:
    """A token for each variable, (B, V, 128): Σ_c z[v,c] E[v,c], a lookup through which gradient reaches z."""
    return torch.einsum("bvc,vcd->bvd", z, table.weight.unflatten(0, z.shape[1:]))


class FrameConv(nn.Conv2d):
    """Convolution of pixels 0 to 255 over 255. It divides its weights by 255, as there are far more pixels."""

    def forward(self, frames: Tensor) -> Tensor:
        """Planes (B, C, h, w) of frames (B, 4, 84, 84) uint8."""
        bf16 = torch.is_autocast_enabled(frames.device.type)
        return self._conv_forward(frames.to(torch.bfloat16 if bf16 else torch.float32), self.weight / 255, self.bias)


class TransitionModel(nn.Module):
    """P̄(·|z, a): draws each variable of the next latent by itself. What it costs does not grow with A."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.noise_shape = NUM_VARIABLES, NUM_CLASSES
        self.embedding = nn.Embedding(NUM_VARIABLES * NUM_CLASSES, 128)
        self.action_embedding = nn.Embedding(num_actions, 128)
        nn.init.normal_(self.action_embedding.weight, std=math.sqrt(1 / 128))
        self.mlp = lecun_mlp(NUM_VARIABLES * 2 * 128, NUM_VARIABLES * NUM_CLASSES)

    def forward(self, z: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """A straight-through sample z̄' of P̄(·|z, a), (B, V, C) as z and the Gumbel noise are, for actions (B,)."""
        tokens = embed(z, self.embedding)  # (B, V, 128)
        action = self.action_embedding(actions).to(tokens.dtype)[:, None].expand_as(tokens)
        logits = self.mlp(torch.cat((tokens, action), dim=-1).flatten(1))
        return one_hot_sample(logits.float().view(z.shape), noise)


class RewardModel(nn.Module):
    """R̄(z, a): a network with one output per action."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.embedding = nn.Embedding(NUM_VARIABLES * NUM_CLASSES, 128)
        self.mlp = lecun_mlp(NUM_VARIABLES * 128, num_actions)

    def forward(self, z: Tensor, actions: Tensor) -> Tensor:
        """Predicted clipped reward (B,) of latents z (B, V, C) and actions (B,)."""
        return self.mlp(embed(z, self.embedding).flatten(1)).float().gather(1, actions[:, None]).squeeze(1)


class Agent(nn.Module):
    """Encoder φ; world model: P̄, R̄ and the done model; actor π̄; critic. They share nothing but the latent."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.encoder = nn.Sequential(
            layer_init(FrameConv(4, 32, 8, stride=4)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)
        latent_size = NUM_VARIABLES * NUM_CLASSES
        self.latent = lecun_linear(7 * 7 * 64, latent_size)
        self.transition_model, self.reward_model = TransitionModel(num_actions), RewardModel(num_actions)
        self.done_mlp = lecun_mlp(latent_size, 1)
        self.actor, self.critic = (
            nn.Sequential(layer_init(nn.Linear(latent_size, 512)), nn.ReLU(), layer_init(nn.Linear(512, n), std))
            for n, std in ((num_actions, 0.01), (1, 1.0))
        )

    def encode(self, obs: Tensor) -> Tensor:
        """z = φ(s), (B, V, C) straight-through one-hot, of frames (B, 84, 84, 4) uint8."""
        planes = self.encoder(obs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, 7, 7, 64)
        return one_hot_sample(self.latent(planes.flatten(1)).float().unflatten(1, (NUM_VARIABLES, NUM_CLASSES)))

    def policy_and_value(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, A) of every action, and the value (B,), of latents z. No gradient of V reaches z."""
        z = z.flatten(1)
        return self.actor(z).float().log_softmax(-1), self.critic(z.detach()).float().squeeze(-1)

    def done_model(self, z: Tensor) -> Tensor:
        """Log-odds (B,) that latents z are those of terminal states."""
        return self.done_mlp(z.flatten(1)).float().squeeze(-1)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each part: a part has a learning rate, and a clipped gradient, of its own."""
        modules = {
            "encoder": (self.encoder, self.latent),
            "world_model": (self.transition_model, self.reward_model, self.done_mlp),
            "actor": (self.actor,),
            "critic": (self.critic,),
        }
        return {name: [p for module in part for p in module.parameters()] for name, part in modules.items()}


# ==== 4. Equations ====================================================================================================
# T steps, N environments, M rows of a minibatch, A actions, H imagined steps, B starts of imagination. A row is a
# transition (s, a, r, s'). Where s is already the last of an episode the row is an auto-reset dummy, not a transition:
# its mask is 0 and it counts nowhere, nor does what is imagined from it.


class Transitions(NamedTuple):
    """The M transitions of a minibatch, or all of a rollout, (T, N) in place of (M,), or all imagined ones, (H, B)."""

    obs: Tensor  # (chunks, L + 1, 84, 84, 4) frames, the last of each chunk as s' only; imagined: z (M, V, C)
    actions: Tensor  # (M,) int64
    rewards: Tensor  # (M,) clipped; imagined: R̄'s
    old_log_probs: Tensor  # (M, A) ln π_old of every action
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,) the value function's target
    next_is_terminal: Tensor  # (M,) 1 where s' is a terminal state
    mask: Tensor  # (M,) 1 real, 0 dummy


def sample_actions(log_probs: Tensor) -> Tensor:
    """Actions (N,) drawn from the policy's ln π (N, A), on the CPU. Raises FloatingPointError if it is not finite."""
    if not log_probs.isfinite().all():
        raise FloatingPointError("log_probs")
    return torch.multinomial(log_probs.exp(), num_samples=1).squeeze(-1)


def compute_gae(
    rewards: Tensor, values: Tensor, is_terminal: Tensor, is_last: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, both (T, N) (Schulman et al., 2016, eq. 16).

    rewards (T, N); values, is_terminal, is_last (T+1, N) of obs[0..T]. A terminal state has value 0. The last of an
    episode cuts the sum. Where the time limit cuts it, it is last and not terminal: its value is bootstrapped.
    """
    assert values.shape == is_terminal.shape == is_last.shape == (len(rewards) + 1, *rewards.shape[1:])
    deltas = rewards + gamma * values[1:] * ~is_terminal[1:] - values[:-1]  # (T, N)
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantage = deltas[t] + gamma * gae_lambda * ~is_last[t + 1] * advantage
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


def clipped_objective(ratio: Tensor, utility: Tensor, clip_coef: float) -> Tensor:
    """min(r U, clip(r, 1 ± ε) U), per transition: (M,). Gradient flows through r and through U."""
    return torch.min(ratio * utility, ratio.clamp(1 - clip_coef, 1 + clip_coef) * utility)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[return - V] / Var[return] over the real rows: 1 is perfect, 0 no better than a constant, or no variance."""
    errors, variance = (masked_mean((x - masked_mean(x, mask)).square(), mask) for x in (returns - values, returns))
    return torch.where(variance > 0, 1 - errors / variance, 0.0)


def gumbel(*shape: int) -> Tensor:
    """Standard Gumbel noise: argmax(ln p + noise) is distributed as p."""
    return -torch.empty(shape).exponential_().log()


def reward_loss(predicted_rewards: Tensor, rewards: Tensor) -> Tensor:
    """|r - R̄(φ(s),a)|, as smooth-L1, per transition: (M,). It is ℓ_R together with `done_loss`."""
    return F.smooth_l1_loss(predicted_rewards, rewards, reduction="none")


def done_loss(log_odds: Tensor, is_terminal: Tensor) -> Tensor:
    """Smooth-L1 of the probability that s' is terminal, per transition: (M,). φ too is to tell terminal states."""
    return F.smooth_l1_loss(log_odds.sigmoid() + 1e-8, is_terminal, reduction="none")


def transition_loss(predicted_next_z: Tensor, next_z: Tensor) -> Tensor:
    """ℓ_P(s,a,s') = d̄(z', z̄'), z̄' ~ P̄(·|z,a): the share of the variables whose class is wrong, per transition: (M,).

    In numbers, smooth-L1 summed over the classes (½ for the class missed, ½ for the one taken), mean over variables.
    Its gradient goes into P̄, z and z', by way of the probabilities of all three.
    """
    return F.smooth_l1_loss(predicted_next_z, next_z, reduction="none").sum(-1).mean(-1)


def surrogate(
    agent: Agent, batch: Transitions, z: Tensor, penalty: Tensor | float, clip_coef: float, args: Args
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO's loss with the utility U = A - penalty; policy, value loss and the like; ln π_new/π_old (M, A).

    z (M, V, C): latents of the transitions; clip_coef: ε.
    """
    log_probs, values = agent.policy_and_value(z)  # (M, A), (M,)
    log_ratios = log_probs - batch.old_log_probs  # (M, A)
    log_ratio = log_ratios.gather(-1, batch.actions[:, None]).squeeze(-1)  # (M,)
    ratio = log_ratio.exp()

    utility = normalize(batch.advantages, batch.mask) - penalty  # first this, then the losses, as they are
    policy_loss = -masked_mean(clipped_objective(ratio, utility, clip_coef), batch.mask)
    value_loss = 0.5 * masked_mean((values - batch.returns).square(), batch.mask)
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), batch.mask)
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    stats = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": masked_mean(ratio - 1 - log_ratio, batch.mask),
        "clipfrac": masked_mean(((ratio - 1).abs() > clip_coef).float(), batch.mask),
    }
    return loss, stats, log_ratios


def model_loss(agent: Agent, batch: Transitions, noise: Tensor, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of φ and the world model on real data, and what of it is logged. noise (M, V, C): Gumbel, for P̄'s sample.

    Actor and critic are constants. Neither z nor z' is detached. The clip ends the pull of the advantage on φ; that of
    the losses goes on, with weight clip(r).
    """
    z = agent.encode(batch.obs.flatten(0, 1)).unflatten(0, batch.obs.shape[:2])  # (chunks, L + 1, V, C)
    z, next_z = z[:, :-1].flatten(0, 1), z[:, 1:].flatten(0, 1)  # (M, V, C)
    l_done = done_loss(agent.done_model(next_z), batch.next_is_terminal)
    l_r = reward_loss(agent.reward_model(z, batch.actions), batch.rewards) + l_done  # (M,)
    l_p = transition_loss(agent.transition_model(z, batch.actions, noise), next_z)  # (M,)
    penalty = args.reward_loss_coef * l_r + args.transition_loss_coef * l_p

    loss, stats, log_ratios = surrogate(agent, batch, z, penalty, args.clip_coef, args)  # U = A - α_R ℓ_R - α_P ℓ_P
    stats = {f"losses/{name}": value for name, value in stats.items()} | {
        "world_model/reward_loss": masked_mean(l_r, batch.mask),
        "world_model/done_loss": masked_mean(l_done, batch.mask),
        "world_model/transition_loss": masked_mean(l_p, batch.mask),
        "world_model/transition_loss_copy": masked_mean(transition_loss(z, next_z), batch.mask),  # z̄' = z instead
        "spi/penalty_mean": masked_mean(penalty, batch.mask),
    }
    stats |= {f"spi/{name}": value for name, value in neighbourhood(log_ratios, batch.mask, 1 + args.clip_coef).items()}
    return loss, {name: value.detach() for name, value in stats.items()}


def behaviour_loss(agent: Agent, batch: Transitions, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of actor and critic on imagined transitions, whose latents are constants, and what of it is logged."""
    loss, stats, _ = surrogate(agent, batch, batch.obs, 0.0, args.imagination_clip_coef, args)
    return loss, {f"imagination/{name}": value.detach() for name, value in stats.items()}


@torch.no_grad()
def imagine(
    agent: Agent, z: Tensor, mask: Tensor, action_noise: Tensor, latent_noise: Tensor, done_noise: Tensor, args: Args
) -> Transitions:
    """H steps in the world model from latents z (B, V, C), with their advantages. All of it is constant.

    mask (B,): 1 for starts that count. Noise: Gumbel (H, B, A) and (H, B, V, C), logistic (H, B). Where an episode ends
    the chain goes on from the latent before that step, as a new start: the sum of rewards is cut there, no row is lost.
    """
    steps, is_done = [], [torch.zeros_like(mask, dtype=torch.bool)]
    for of_action, of_latent, of_done in zip(action_noise, latent_noise, done_noise, strict=True):
        log_probs, values = agent.policy_and_value(z)
        actions = (log_probs + of_action).argmax(-1)  # a ~ π̄(·|z)
        next_z = agent.transition_model(z, actions, of_latent)  # z̄' ~ P̄(·|z, a)
        is_done.append(agent.done_model(next_z) + of_done > 0)  # with the model's probability for z̄'
        steps.append((z, actions, agent.reward_model(z, actions), log_probs, values))
        z = torch.where(is_done[-1][:, None, None], z, next_z)
    latents, actions, rewards, log_probs, values = map(torch.stack, zip(*steps, strict=True))
    values, is_done = torch.cat((values, agent.policy_and_value(z)[1][None])), torch.stack(is_done)  # (H + 1, B)
    advantages, returns = compute_gae(rewards, values, is_done, is_done, args.gamma, args.gae_lambda)
    return Transitions(
        latents, actions, rewards, log_probs, advantages, returns, is_done[1:].float(), mask.expand_as(rewards)
    )


def neighbourhood(log_ratios: Tensor, mask: Tensor, c: float) -> dict[str, Tensor]:
    """Of π'/π, whose logarithms are (M, A): the least and the largest, and how much of it lies outside N^C."""
    ratios = torch.where(mask[:, None] > 0, log_ratios.exp(), 1.0)
    outside = (ratios > c) | (ratios < 2 - c)
    return {
        "ratio_min": ratios.min(),
        "ratio_max": ratios.max(),
        "outside_neighbourhood": masked_mean(outside.float().mean(-1), mask),
    }


def make_optimizer(agent: Agent, args: Args) -> torch.optim.Adam:
    """Adam over all parts of the agent: a group for each, which knows its name and its first learning rate."""
    rates = dict.fromkeys(("encoder", "world_model"), args.learning_rate)
    rates |= dict.fromkeys(("actor", "critic"), args.behaviour_learning_rate)
    groups = [{"params": part, "name": n, "lr": rates[n], "first_lr": rates[n]} for n, part in agent.parts().items()]
    return torch.optim.Adam(groups, eps=1e-5, fused=True)


def optimizer_step(
    optimizer: torch.optim.Adam, loss: Tensor, names: tuple[str, ...], max_grad_norm: float
) -> dict[str, Tensor]:
    """Move the parts of these names and nothing else, by the gradient at current weights of all; its norms are logged.

    Each part's gradient is clipped to a norm of its own: summed in float64, as float32 loses five digits over millions
    of weights. What has no gradient, Adam leaves alone, its moments too.
    """
    parts = {group["name"]: group["params"] for group in optimizer.param_groups if group["name"] in names}
    optimizer.zero_grad()
    loss.backward(inputs=[parameter for part in parts.values() for parameter in part])
    norms = {}
    for name, part in parts.items():
        squares = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square() for parameter in part]
        norms[f"losses/grad_norm_{name}"] = norm = torch.stack(squares).sum().sqrt().float()
        torch._foreach_mul_([parameter.grad for parameter in part], (max_grad_norm / norm).clamp(max=1))
    optimizer.step()
    return norms


def reward_sum(rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    """Discounted sum of rewards (H, B) up to the first end, where ends (H, B) is 1 if that step ended its episode."""
    is_alive = torch.cat((torch.ones_like(ends[:1]), (1 - ends[:-1]).cumprod(0)))
    return (rewards * is_alive * gamma ** torch.arange(len(rewards))[:, None]).sum(0)


def planning_stats(agent: Agent, imagined: Transitions, gamma: float) -> dict[str, Tensor]:
    """How far the actor has moved on all imagined states. The planning theorem wants π̄ within N^{1/γ} of π̄_b.

    The largest ratio π̄/π̄_b; the mean over states of each one's largest; the share of states with all actions inside.
    """
    log_probs, mask = agent.policy_and_value(imagined.obs.flatten(0, 1))[0], imagined.mask.flatten()
    ratios = torch.where(mask[:, None] > 0, (log_probs - imagined.old_log_probs.flatten(0, 1)).exp(), 1.0)
    is_inside = ((ratios <= 1 / gamma) & (ratios >= 2 - 1 / gamma)).all(-1)
    return {
        "spi/planning_ratio_max": ratios.max(),
        "spi/planning_ratio_mean": masked_mean(ratios.amax(-1), mask),
        "spi/planning_inside": masked_mean(is_inside.float(), mask),
    }


def calibration(
    imagined: Transitions, starts: Tensor, rewards: Tensor, is_terminal: Tensor, is_last: Tensor, gamma: float
) -> dict[str, Tensor]:
    """What is imagined against what happened, both on the CPU: ends per step, and rewards from the same starts.

    starts (B,): rows of the rollout's T N. Rewards are summed over min(T, H) steps from the rollout's first
    observations, without any value function.
    """
    (T, N), n = rewards.shape, min(len(rewards), len(imagined.rewards))
    ends, real = is_terminal[1:].float(), (~is_last[:T]).float()
    dreamt = reward_sum(imagined.rewards[:n], imagined.next_is_terminal[:n], gamma)  # (B,)
    happened = reward_sum(rewards[:n], is_last[1 : n + 1].float(), gamma)[starts % N]
    mask = imagined.mask[0] * (starts < N)
    return {
        "imagination/done_rate": masked_mean(imagined.next_is_terminal, imagined.mask),
        "imagination/real_done_rate": masked_mean(ends, real),
        "imagination/reward_sum": masked_mean(dreamt, mask),
        "imagination/real_reward_sum": masked_mean(happened, mask),
        "imagination/reward_sum_error": masked_mean((dreamt - happened).abs(), mask),
    }


def latent_stats(agent: Agent, z: Tensor, is_terminal: Tensor, is_last: Tensor) -> dict[str, Tensor]:
    """Of the latents z ((T + 1) N, V, C) of a rollout: what they use of their classes, and whether they tell its ends.

    The share of classes never taken; the entropy (nats) of a variable's classes; the share of terminal states that the
    done model calls so, if there are any.
    """
    usage = z[~is_last.flatten()].mean(0)  # (V, C)
    stats = {
        "world_model/dead_classes": (usage == 0).float().mean(),
        "world_model/latent_entropy": torch.special.entr(usage).sum(-1).mean(),
    }
    if is_terminal.any():
        stats["world_model/done_accuracy_last"] = (agent.done_model(z[is_terminal.flatten()]) > 0).float().mean()
    return stats


def over_minibatches(rows: list[dict[str, Tensor]]) -> dict[str, float]:
    """What is logged of minibatches, if there are any: the least and the largest ratio, and the mean of all else."""
    table = {name: torch.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    extremes = {"spi/ratio_min": torch.min, "spi/ratio_max": torch.max}
    return {name: extremes.get(name, torch.mean)(column).item() for name, column in table.items()}


# ==== 5. Training =====================================================================================================


def train(args: Args) -> None:
    """Play a rollout; learn φ and the world model from it; learn to act in imagination; again and again."""
    T, N, L, H = args.num_steps, args.num_envs, args.chunk_length, args.horizon
    num_starts, num_iterations = args.imagination_starts or T * N, args.total_timesteps // (T * N)
    run = Run(args)
    device, autocast = run.device, torch.autocast(run.device, torch.bfloat16, enabled=run.precision == "bf16")

    torch.manual_seed(args.seed)
    games = Games(args, run.iterations)
    agent = Agent(games.num_actions).to(device)
    optimizer = make_optimizer(agent, args)
    run.restore(agent=agent, optimizer=optimizer)

    # Frames and policies live on the device; the rest, like the games, on the CPU.
    obs = torch.zeros((T + 1, N, 84, 84, 4), dtype=torch.uint8, device=device)
    log_probs = torch.zeros((T, N, games.num_actions), device=device)
    values = torch.zeros((T + 1, N), device=device)
    actions = torch.zeros((T, N), dtype=torch.int64)
    rewards = torch.zeros((T, N))
    is_terminal, is_last = torch.zeros((2, T + 1, N), dtype=torch.bool)  # of obs[t]: a state of value 0, an episode's end
    obs[T] = games.reset()

    for iteration in range(run.iterations, num_iterations):
        # ---- Rollout
        for group in optimizer.param_groups:
            group["lr"] = (1 - iteration / num_iterations) * group["first_lr"]
        obs[0], is_last[0] = obs[T], is_last[T]
        for t in range(T):
            with torch.no_grad(), autocast:
                log_probs[t], values[t] = agent.policy_and_value(agent.encode(obs[t]))
            actions[t] = sample_actions(log_probs[t].cpu())
            obs[t + 1], rewards[t], is_terminal[t + 1], is_last[t + 1], episodes = games.step(actions[t])
            run.log_episodes((iteration * T + t + 1) * N, episodes)

        # ---- Advantages
        with torch.no_grad(), autocast:
            values[T] = agent.policy_and_value(agent.encode(obs[T]))[1]
        advantages, returns = compute_gae(rewards, values.cpu(), is_terminal, is_last, args.gamma, args.gae_lambda)
        mask, ends = (~is_last[:T]).float(), is_terminal[1:].float()
        of_steps = [x.to(device) for x in (actions, rewards, log_probs, advantages, returns, ends, mask)]

        # ---- Update of φ and the world model, on real data
        for _ in range(args.update_epochs):
            model_stats = []
            for chunks in torch.randperm(N * T // L).chunk(args.num_minibatches):
                # A chunk is L steps of one environment. Its L + 1 frames are encoded once, as s and as the last s'.
                t = chunks[:, None] // N * L + torch.arange(L + 1)
                frames = t * N + chunks[:, None] % N  # (chunks, L + 1), rows of the (T + 1) N frames
                if not mask.flatten()[frames[:, :-1]].any():
                    continue  # dummies alone: nothing to learn from
                frames, steps = frames.to(device), frames[:, :-1].flatten().to(device)
                batch = Transitions(obs.flatten(0, 1)[frames], *(x.flatten(0, 1)[steps] for x in of_steps))
                noise = gumbel(len(steps), *agent.transition_model.noise_shape).to(device)
                with autocast:
                    loss, stats = model_loss(agent, batch, noise, args)
                stats |= optimizer_step(optimizer, loss, ("encoder", "world_model"), args.max_grad_norm)
                model_stats.append(stats)

        # ---- Imagination, from the new latents
        with torch.no_grad(), autocast:
            z = agent.encode(obs.flatten(0, 1))  # ((T + 1) N, V, C)
            starts = torch.randperm(T * N)[:num_starts]
            is_real = mask.flatten()[starts]
            noise = gumbel(H, num_starts, games.num_actions), gumbel(H, num_starts, *z.shape[1:])
            noise = [x.to(device) for x in (*noise, torch.rand(H, num_starts).logit())]
            imagined = imagine(agent, z[starts.to(device)], is_real.to(device), *noise, args)

        # ---- Update of actor and critic, on what is imagined
        for _ in range(args.imagination_epochs):
            behaviour_stats = []
            for rows in torch.randperm(H * num_starts).chunk(H * args.num_minibatches):
                if not is_real[rows % num_starts].any():
                    continue
                batch = Transitions(*(x.flatten(0, 1)[rows.to(device)] for x in imagined))
                with autocast:
                    loss, stats = behaviour_loss(agent, batch, args)
                stats |= optimizer_step(optimizer, loss, ("actor", "critic"), args.max_grad_norm)
                behaviour_stats.append(stats)

        # ---- Logging, of the last epochs
        with torch.no_grad(), autocast:
            stats = planning_stats(agent, imagined, args.gamma) | latent_stats(agent, z, is_terminal, is_last)
        imagined = Transitions(*(x.cpu() for x in imagined))
        stats |= calibration(imagined, starts, rewards, is_terminal, is_last, args.gamma)
        metrics = over_minibatches(model_stats) | over_minibatches(behaviour_stats) | over_minibatches([stats])
        metrics["losses/explained_variance"] = explained_variance(values[:T].cpu(), returns, mask).item()
        metrics["losses/weight_norm"] = nn.utils.get_total_norm(agent.parameters()).item()
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        run.log(metrics)
        if run.is_checkpoint_due():
            with torch.no_grad(), autocast:  # how far the policy has moved in this iteration, everywhere
                new_log_probs, _ = agent.policy_and_value(agent.encode(obs[:T].flatten(0, 1)))
            log_ratios = (new_log_probs - log_probs.flatten(0, 1)).cpu()[mask.flatten() > 0]
            run.checkpoint(log_ratios, agent=agent, optimizer=optimizer)


# ==== 6. The run's folder =============================================================================================


class Run:
    """One run: its folder, its log, and the checkpoint that it goes on from.

    config.json: settings, machine, versions, commit      <script>.py: this very code; evaluate.py plays with it
    episodes.csv: global step, return, length             checkpoint.pt: all that the run needs to go on
    events.*: curves, for TensorBoard                     agent.pt: the final weights, when all is done
    """

    def __init__(self, args: Args):
        """Open the folder, new or of a run to go on with. Raises SystemExit: 2 if it cannot be, 0 if all is done."""
        self.args, self.script, self.signal = args, Path(__file__).resolve(), None
        self.rollout = args.num_envs * args.num_steps  # global steps per iteration
        self.device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
        units = torch.cpu.get_capabilities()  # bf16 where the hardware computes in it, not where it is emulated
        has_bf16 = units.get("amx_bf16") or units.get("avx512_bf16")
        if self.device == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = args.precision if args.precision != "auto" else "bf16" if has_bf16 else "fp32"

        name = f"{args.env_id.replace('/', '-')}__{self.script.stem}__{args.seed}__{int(time.time())}"
        self.dir = Path(args.run_dir or f"runs/{name}")
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.episodes = open(self.dir / "episodes.csv", "a", buffering=1)  # each line is flushed
            fcntl.flock(self.episodes, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            args.check("run_dir", False, f"cannot be used, or another process is at it: {error}")
        self.config = self.describe()
        self.state = self.load() if (self.dir / "checkpoint.pt").exists() else {}
        self.iterations, self.start_time = self.state.get("iterations", 0), time.time() - self.state.get("seconds", 0)
        if self.is_complete():
            print(f"{self.dir}: complete; a larger --total-timesteps makes it longer")
            raise SystemExit(0)

        step = self.iterations * self.rollout
        if self.state:
            before, leg = self.state["config"], {"global_step": step} | self.config
            self.config = before | {"args": vars(args), "resumes": [*before["resumes"], leg]}
        description = json.dumps(self.config, indent=2)
        (self.dir / "config.json").write_text(description + "\n")
        (self.dir / self.script.name).write_bytes(self.script.read_bytes())
        (self.dir / "agent.pt").unlink(missing_ok=True)
        self.episodes.truncate(self.state.get("episodes_bytes", 0))  # what came later is made again
        if not self.state:
            self.episodes.write("global_step,return,length\n")
        if args.track:
            import wandb  # optional, and nobody else should have to wait for it

            name = {"name": self.dir.name, "id": self.config["id"], "resume": "allow"}
            wandb.init(**name, dir=self.dir.parent, config=self.config, sync_tensorboard=True)
        self.writer = SummaryWriter(self.dir, purge_step=step + 1)
        self.writer.add_text("config", f"```\n{description}\n```")
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", desc=self.dir.name)
        self.recent_returns = deque(maxlen=100)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.stop_soon)

    def stop_soon(self, number: int, _) -> None:
        """End the run after this iteration; a second signal of the kind ends it at once."""
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def is_complete(self) -> bool:
        """Whether there is no room for another iteration."""
        return (self.iterations + 1) * self.rollout > self.args.total_timesteps

    def describe(self) -> dict:
        """All that one must know to repeat the run, or to doubt it."""
        git = {"shell": True, "cwd": self.script.parent, "capture_output": True, "text": True}
        commit = subprocess.run("git describe --always --abbrev=40 --exclude '*' --dirty", **git).stdout.strip()
        if commit and self.script.name not in subprocess.run("git ls-files", **git).stdout.splitlines():
            commit += "-untracked"
        packages = ("torch", "envpool", "gymnasium", "numpy")
        return {
            "script": self.script.name,
            "script_path": str(self.script),
            "args": vars(self.args),
            "device": self.device,
            "precision": self.precision,
            "torch_threads": torch.get_num_threads(),
            "git_commit": commit or None,
            "machine": f"{torch.cpu.get_capabilities()['cpu_name']}, {os.cpu_count()} cores, {platform.platform()}",
            "gpu": torch.cuda.get_device_name() if self.device == "cuda" else None,
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            "id": f"{time.time_ns():x}",
            "resumes": [],
        }

    def load(self) -> dict:
        """What checkpoint.pt holds. Raises SystemExit(2) if it is damaged, or of a run with other settings."""
        try:
            assert zipfile.ZipFile(self.dir / "checkpoint.pt").testzip() is None  # torch.load checks no sums
            state = torch.load(self.dir / "checkpoint.pt", map_location="cpu", weights_only=True)
            assert (self.dir / "episodes.csv").stat().st_size >= state["episodes_bytes"]
            before = state["config"] | state["config"]["args"]
        except Exception:  # of many kinds, as any byte may be wrong
            self.args.check("run_dir", False, "its checkpoint.pt or its episodes.csv is damaged")
        free = ("run_dir", "checkpoint_interval", "track", "total_timesteps")
        for name, value in ({n: self.config[n] for n in ("script", "device", "precision")} | vars(self.args)).items():
            if name not in free:
                self.args.check(name, before.get(name) == value, f"of a run with {before.get(name)!r}")
        return state

    def restore(self, **parts) -> None:
        """Give agent, optimizer and the like the states that the checkpoint has of them."""
        for name, part in parts.items() if self.state else ():
            part.load_state_dict(self.state[name])
            torch.set_rng_state(self.state["rng"])

    def log_episodes(self, step: int, episodes: dict[int, tuple[float, int]]) -> None:
        """Return and length of every episode that has ended."""
        for episodic_return, length in episodes.values():
            self.episodes.write(f"{step},{episodic_return},{length}\n")
            self.writer.add_scalar("charts/episodic_return", episodic_return, step)
            self.writer.add_scalar("charts/episodic_length", length, step)
            self.recent_returns.append(episodic_return)

    def log(self, metrics: dict[str, float]) -> None:
        """Log an iteration. Raises FloatingPointError if a metric, but for a ratio, is not finite."""
        self.iterations += 1
        step = self.iterations * self.rollout
        for name, value in {**metrics, "charts/SPS": step / (time.time() - self.start_time)}.items():
            if not math.isfinite(value) and not name.startswith("spi/"):  # a ratio may overflow, and harm nothing
                raise FloatingPointError(f"stopped at step {step}: not finite: {name}")
            self.writer.add_scalar(name, value, step)
        self.bar.set_postfix({"return": np.mean(self.recent_returns or np.nan)}, refresh=False)
        self.bar.update(self.rollout)

    def is_checkpoint_due(self) -> bool:
        """Every so many iterations, after a signal, and at the end."""
        return self.iterations % self.args.checkpoint_interval == 0 or self.signal or self.is_complete()

    def checkpoint(self, log_ratios: Tensor, **parts) -> None:
        """Save what the run goes on from, and how far ln π has moved. Raises SystemExit(75) after a signal."""
        if not log_ratios.isfinite().all():
            raise FloatingPointError("not finite: log_probs")
        self.writer.add_histogram("spi/ratios", log_ratios.exp(), self.iterations * self.rollout)
        self.writer.flush()
        os.fsync(self.episodes.fileno())
        state = {name: part.state_dict() for name, part in parts.items()}
        if self.is_complete():
            self.save(state["agent"], "agent.pt")
        state |= {"rng": torch.get_rng_state(), "config": self.config, "iterations": self.iterations}
        state |= {"global_step": self.iterations * self.rollout, "seconds": time.time() - self.start_time}
        self.save(state | {"episodes_bytes": (self.dir / "episodes.csv").stat().st_size}, "checkpoint.pt")
        if self.is_complete():
            print(f"{self.dir}: complete")
        elif self.signal:
            print(f"stopped by {self.signal.name}; the same command with --run-dir {self.dir} goes on", file=sys.stderr)
            raise SystemExit(75)

    def save(self, state: dict, name: str) -> None:
        """torch.save so that at any instant, power cuts included, the old or the new file is there. Raises OSError."""
        torch.save(state, content := io.BytesIO())
        path, temporary = self.dir / name, self.dir / f"{name}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(content.getvalue())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's thread: its error is raised again here, and told below
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")
    try:
        train(tyro.cli(Args, description=__doc__))
    except (FloatingPointError, OSError) as error:  # OSError: a full disk, say; the last checkpoint is whole
        sys.exit(f"\nerror: {error}")
