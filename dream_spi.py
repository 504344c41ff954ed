# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "envpool==1.2.5", "gymnasium==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2", "scipy==1.17.1"]
# ///
"""DreamSPI on vector observations: planning in a world model that the clip keeps close (Delgrange et al., ICLR 2026).

    python dream_spi.py                                    # CartPole-v1, by an actor that sees no gradient of real data
    python dream_spi.py --env-id LunarLander-v3 --total-timesteps 1500000

    1. real data trains φ and the world model     U = A - α_R ℓ_R - α_P ℓ_P,  J = E[ min( r U, clip(r, 1 ± ε) U ) ]
    2. imagination trains actor and critic        PPO on H steps in P̄, R̄ and the done model from each z = φ(s)

    φ  encode             R̄  reward_model         ℓ_R  reward_loss + done_loss    α_R  reward_loss_coef
    z  V x C classes      P̄  transition_model     ℓ_P  transition_loss            α_P  transition_loss_coef

Diff me against `dream_spi_atari.py`: the same on pixels, with the published weights of the losses. Here ends are rare
and must be known, so these are far larger. One set of defaults, for any EnvPool environment with discrete actions that
observes an array of floats or an integer.
"""

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
    env_id: str = "CartPole-v1"  # EnvPool id of an environment with discrete actions and no pixels
    total_timesteps: int = 400_000  # environment steps in all, rounded down to whole rollouts
    num_envs: int = 64  # N, parallel environments
    num_steps: int = 64  # T, steps of each environment per iteration
    sticky: float = 0.0  # probability that the last action is repeated instead of the one chosen: a stochastic task

    # ---- Both updates
    gamma: float = 0.99  # γ, discount factor; the planning theorem's neighbourhood is N^{1/γ}
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    ent_coef: float = 0.001  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient, of each part by itself

    # ---- Real data: φ and the world model
    learning_rate: float = 5e-4  # Adam's step size of the encoder and of the world model, annealed linearly to 0
    num_minibatches: int = 8  # minibatches per epoch; per epoch and imagined step in imagination
    update_epochs: int = 4  # passes over the rollout per iteration
    chunk_length: int = 8  # L, consecutive steps of one environment sampled together (1: single steps, as published)
    clip_coef: float = 0.1  # ε of the clip that holds φ in the neighbourhood
    reward_loss_coef: float = 10.0  # α_R, weight of the reward loss, the done loss included
    transition_loss_coef: float = 1.0  # α_P, weight of the transition loss

    # ---- Imagination: actor and critic
    behaviour_learning_rate: float = 5e-4  # Adam's step size of the actor and of the critic, annealed linearly to 0
    horizon: int = 8  # H, imagined steps from each start
    imagination_starts: int = 0  # B, rows of the rollout to start from, drawn in each iteration (0: all of them)
    imagination_epochs: int = 1  # passes over what is imagined per iteration
    imagination_clip_coef: float = 0.1  # ε of the clip that holds the actor; 1/γ - 1 is the planning theorem's

    def __post_init__(self):
        """Refuse what cannot work, in one line. Raises SystemExit(2), as for every usage error."""
        for name, kind in ((field.name, field.type) for field in fields(self) if field.type in (int, float)):
            least = 0 if name in ("seed", "imagination_starts") or kind is float else 1
            self.check(name, least <= getattr(self, name) < np.inf, f"must be finite and at least {least}")
        for name in ("sticky", "gamma", "gae_lambda"):
            self.check(name, getattr(self, name) <= 1, "must lie in [0, 1]")
        for name in ("learning_rate", "behaviour_learning_rate", "gamma", "max_grad_norm"):
            self.check(name, getattr(self, name) > 0, "must be positive")
        self.check("seed", self.seed < 2**63, "must be below 2^63")
        for name in ("clip_coef", "imagination_clip_coef"):
            self.check(name, 0 < getattr(self, name) < 1, "must lie in (0, 1), so that 1 < C < 2")
        rollout, chunks = self.num_envs * self.num_steps, self.num_envs * self.num_steps // self.chunk_length
        self.check("total_timesteps", self.total_timesteps >= rollout, f"must be at least one rollout, {rollout}")
        self.check("chunk_length", self.num_steps % self.chunk_length == 0, f"must divide num_steps = {self.num_steps}")
        self.check("num_minibatches", chunks % self.num_minibatches == 0, f"must divide the rollout's {chunks} chunks")
        whole = self.imagination_starts <= rollout and self.imagination_starts % self.num_minibatches == 0
        self.check("imagination_starts", whole, f"must be at most {rollout}, a multiple of {self.num_minibatches}")
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
    if not isinstance(actions, gym.spaces.Discrete):
        return f"actions must be discrete, not {type(actions).__name__}"
    is_array = isinstance(observations, gym.spaces.Box) and np.issubdtype(observations.dtype, np.floating)
    if not is_array and not isinstance(observations, gym.spaces.Discrete):
        return "observations must be an integer or an array of floats; for Atari frames see deep_spi_ppo_atari.py"
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
        space = self.envs.observation_space
        self.num_inputs = int(space.n) if isinstance(space, gym.spaces.Discrete) else int(np.prod(space.shape))
        self.num_actions = int(self.envs.action_space.n)
        self.sticky, self.rng = args.sticky, np.random.default_rng(stream.spawn(1)[0])
        self.executed = np.zeros(args.num_envs, dtype=np.int32)
        # The first step is as if after a dummy.
        self.is_dummy, self.is_last = np.ones(args.num_envs, dtype=bool), np.zeros(args.num_envs, dtype=bool)
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)

    def vectorize(self, obs: np.ndarray) -> Tensor:
        """Observations as float32 vectors (N, O): integers (N,) one-hot, arrays of floats flattened."""
        if np.issubdtype(obs.dtype, np.integer):
            obs = obs[:, None] == np.arange(self.num_inputs)
        return torch.from_numpy(obs.reshape(len(obs), self.num_inputs).astype(np.float32))

    def reset(self) -> Tensor:
        """First observations (N, O)."""
        return self.vectorize(self.envs.reset()[0])

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[int, tuple[float, int]]]:
        """s', reward, is_terminal, is_last, (N, ...) each; and the episodes that ended: environment -> return, length.

        s' is the true next observation even at an end, where the next step only resets: a dummy row, of reward 0.
        """
        repeat = (self.rng.random(len(actions)) < self.sticky) & ~self.is_dummy  # never in an episode's first step
        self.executed = np.where(repeat, self.executed, actions.numpy()).astype(np.int32)
        obs, rewards, terminated, truncated, _ = self.envs.step(self.executed)
        self.is_dummy, self.is_last = self.is_last, terminated | truncated
        self.returns += rewards
        self.lengths += ~self.is_dummy
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
# B rows, O inputs, A actions. The latent z = φ(s) is V = 8 variables of C = 8 classes each: (B, V, C), one-hot.

NUM_VARIABLES, NUM_CLASSES = 8, 8
MODEL, BEHAVIOUR = ("encoder", "world_model"), ("actor", "critic")  # parts of the agent: what real data trains, and not


def layer_init(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """Orthogonal weights of this gain, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def lecun_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers, ReLU between them. Weights are normal of variance 1/inputs, their tails cut, and made up for."""
    layers = []
    for i, num_inputs in enumerate(sizes[:-1]):
        layers += [nn.Linear(num_inputs, sizes[i + 1]), nn.ReLU()]
        std = num_inputs**-0.5 / 0.87962566
        nn.init.trunc_normal_(layers[-2].weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def one_hot_sample(logits: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """One-hot argmax of logits + noise (B, V, C), exact. Its gradient is the probabilities': straight-through."""
    p = logits.softmax(-1)
    return F.one_hot((logits + noise).argmax(-1), logits.shape[-1]) + (p - p.detach())


def embed(z: Tensor, table: nn.Embedding) -> Tensor:
    """A token for each variable, (B, V, size): Σ_c z[v,c] E[v,c], a lookup through which gradient reaches z."""
    return torch.einsum("bvc,vcd->bvd", z, table.weight.unflatten(0, z.shape[1:]))


class Agent(nn.Module):
    """Encoder φ; world model: P̄, R̄ and the done model; actor π̄; critic. They share nothing but the latent."""

    def __init__(self, num_inputs: int, num_actions: int):
        super().__init__()
        size = NUM_VARIABLES * NUM_CLASSES
        layers = layer_init(nn.Linear(num_inputs, 64)), layer_init(nn.Linear(64, 64))
        self.encoder = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh())
        self.latent = lecun_mlp(64, size)
        self.world_model = nn.ModuleDict(
            {
                "tokens": nn.Embedding(size, 16),  # P̄'s table of the classes of each variable
                "actions": nn.Embedding(num_actions, 16),
                "transition": lecun_mlp(NUM_VARIABLES * (16 + 16), 128, size),
                "reward_tokens": nn.Embedding(size, 16),
                "reward": lecun_mlp(NUM_VARIABLES * 16, 128, num_actions),
                "done": lecun_mlp(size, 128, 1),
            }
        )
        nn.init.normal_(self.world_model["actions"].weight, std=16**-0.5)
        self.actor, self.critic = (
            nn.Sequential(layer_init(nn.Linear(size, 64)), nn.ReLU(), layer_init(nn.Linear(64, num_outputs), std))
            for num_outputs, std in ((num_actions, 0.01), (1, 1.0))
        )

    def encode(self, obs: Tensor) -> Tensor:
        """z = φ(s), (B, V, C) straight-through one-hot, of observations (B, O)."""
        return one_hot_sample(self.latent(self.encoder(obs)).float().unflatten(1, (NUM_VARIABLES, NUM_CLASSES)))

    def transition_model(self, z: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """A sample z̄' of P̄(·|z, a), each variable by itself; (B, V, C), as z and the Gumbel noise; actions (B,)."""
        tokens = embed(z, self.world_model["tokens"])  # (B, V, 16)
        action = self.world_model["actions"](actions).to(tokens.dtype)[:, None].expand_as(tokens)
        logits = self.world_model["transition"](torch.cat((tokens, action), dim=-1).flatten(1))
        return one_hot_sample(logits.float().view(z.shape), noise)

    def reward_model(self, z: Tensor, actions: Tensor) -> Tensor:
        """R̄(z, a): the predicted scaled reward (B,) of latents z (B, V, C) and actions (B,)."""
        rewards = self.world_model["reward"](embed(z, self.world_model["reward_tokens"]).flatten(1))  # (B, A)
        return rewards.float().gather(1, actions[:, None]).squeeze(1)

    def done_model(self, z: Tensor) -> Tensor:
        """Log-odds (B,) that latents z are those of terminal states."""
        return self.world_model["done"](z.flatten(1)).float().squeeze(-1)

    def policy_and_value(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, A) of every action, and the value (B,), of latents z. No gradient of V reaches z."""
        z = z.flatten(1)
        return self.actor(z).float().log_softmax(-1), self.critic(z.detach()).float().squeeze(-1)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each part: a part has a learning rate, and a clipped gradient, of its own."""
        encoder = [*self.encoder.parameters(), *self.latent.parameters()]
        others = {"world_model": self.world_model, "actor": self.actor, "critic": self.critic}
        return {"encoder": encoder, **{name: list(part.parameters()) for name, part in others.items()}}


# ==== 4. Equations ====================================================================================================
# T steps, N environments, M rows of a minibatch, A actions; H imagined steps, B starts. A row is a transition (s, a, r,
# s'). Where s is already the last of an episode the row is an auto-reset dummy, not a transition: its mask is 0 and it
# counts nowhere, nor does what is imagined from it.


class Transitions(NamedTuple):
    """The M transitions of a minibatch, chunk after chunk. A whole rollout has (T, N) for (M,), dreams (H, B)."""

    obs: Tensor  # (M / L, L + 1, O) the observations s, and the last s'; imagined: z (M, V, C)
    actions: Tensor  # (M,) int64
    rewards: Tensor  # (M,) scaled; imagined: R̄'s
    old_log_probs: Tensor  # (M, A) ln π_old of every action
    advantages: Tensor  # (M,)
    returns: Tensor  # (M,) the value function's target
    next_is_terminal: Tensor  # (M,) 1 where s' has value 0; imagined: what the done model drew
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


def clipped_objective(ratio: Tensor, utility: Tensor, clip_coef: float) -> Tensor:
    """min(r U, clip(r, 1 ± ε) U), per transition: (M,). Gradient flows through r, and through U if it has one."""
    return torch.min(ratio * utility, ratio.clamp(1 - clip_coef, 1 + clip_coef) * utility)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[return - V] / Var[return] over the real rows: 1 is perfect, 0 no better than a constant."""
    returns = returns.double()  # so that the variance of constants is exactly 0
    errors, variance = (masked_mean((x - masked_mean(x, mask)).square(), mask) for x in (returns - values, returns))
    return torch.where(variance > 0, 1 - errors / variance, 0.0)


def gumbel(*shape: int) -> Tensor:
    """Standard Gumbel noise: argmax(ln p + noise) is distributed as p."""
    return -torch.empty(shape).exponential_().log()


def reward_loss(predicted_rewards: Tensor, rewards: Tensor) -> Tensor:
    """|r - R̄(φ(s),a)|, as smooth-L1, per transition: (M,). ℓ_R is this and `done_loss`."""
    return F.smooth_l1_loss(predicted_rewards, rewards, reduction="none")


def done_loss(log_odds: Tensor, is_terminal: Tensor) -> Tensor:
    """Smooth-L1 of the probability that s' is terminal, per transition: (M,). φ too is to tell these states."""
    return F.smooth_l1_loss(log_odds.sigmoid() + 1e-8, is_terminal, reduction="none")


def transition_loss(predicted_next_z: Tensor, next_z: Tensor) -> Tensor:
    """ℓ_P(s,a,s') = d̄(z', z̄'), z̄' ~ P̄(·|z,a): the share of the variables whose class is wrong, per transition: (M,).

    Smooth-L1: ½ for the class missed, ½ for the one taken. Its gradient goes into P̄, z and z', by their probabilities.
    """
    return F.smooth_l1_loss(predicted_next_z, next_z, reduction="none").sum(-1).mean(-1)


def compute_loss(
    agent: Agent, batch: Transitions, z: Tensor, penalty: Tensor | float, clip_coef: float, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss on latents z (M, V, C), of the utility U = A - penalty; and what of it is logged."""
    log_probs, values = agent.policy_and_value(z)  # (M, A), (M,)
    log_ratios = log_probs - batch.old_log_probs  # (M, A)
    log_ratio = log_ratios.gather(-1, batch.actions[:, None]).squeeze(-1)  # (M,)
    ratio = log_ratio.exp()

    utility = normalize(batch.advantages, batch.mask) - penalty  # first this, then the losses, as they are
    policy_loss = -masked_mean(clipped_objective(ratio, utility, clip_coef), batch.mask)
    value_loss = 0.5 * masked_mean((values - batch.returns).square(), batch.mask)
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), batch.mask)
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss

    ratios = torch.where(batch.mask[:, None] > 0, log_ratios.exp(), 1.0)  # of every action; 1 in dummies
    outside = (ratios > 1 + clip_coef) | (ratios < 1 - clip_coef)  # of N^C with C = 1 + ε
    stats = {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": masked_mean(ratio - 1 - log_ratio, batch.mask),
        "losses/clipfrac": masked_mean(((ratio - 1).abs() > clip_coef).float(), batch.mask),
        "spi/ratios": ratios,
        "spi/outside_neighbourhood": masked_mean(outside.float().mean(-1), batch.mask),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


def model_loss(agent: Agent, batch: Transitions, noise: Tensor, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of φ and the world model on real data, and what of it is logged. noise (M, V, C): Gumbel, for z̄'."""
    z = agent.encode(batch.obs.flatten(0, 1)).unflatten(0, batch.obs.shape[:2])  # (M / L, L + 1, V, C)
    z, next_z = z[:, :-1].flatten(0, 1), z[:, 1:].flatten(0, 1)  # (M, V, C)
    l_done = done_loss(agent.done_model(next_z), batch.next_is_terminal)
    l_r = reward_loss(agent.reward_model(z, batch.actions), batch.rewards) + l_done  # (M,)
    l_p = transition_loss(agent.transition_model(z, batch.actions, noise), next_z)  # (M,)
    penalty = args.reward_loss_coef * l_r + args.transition_loss_coef * l_p

    loss, stats = compute_loss(agent, batch, z, penalty, args.clip_coef, args)  # U = A - α_R ℓ_R - α_P ℓ_P
    of_model = {"reward_loss": l_r, "done_loss": l_done, "transition_loss": l_p}
    of_model["transition_loss_copy"] = transition_loss(z, next_z)  # of "no change"
    stats |= {f"world_model/{name}": masked_mean(x, batch.mask).detach() for name, x in of_model.items()}
    return loss, stats | {"spi/penalty_mean": masked_mean(penalty, batch.mask).detach()}


def imagine(
    agent: Agent, z: Tensor, mask: Tensor, action_noise: Tensor, latent_noise: Tensor, done_noise: Tensor, args: Args
) -> Transitions:
    """H steps in the world model from latents z (B, V, C), with their advantages; to be run without gradient.

    mask (B,): 1 for starts that count. Noise: Gumbel (H, B, A) and (H, B, V, C), logistic (H, B). Where an episode ends
    the chain goes on from the latent before that step, as a new start: the sum of rewards is cut, and no row is lost.
    """
    steps, is_done = [], [torch.zeros_like(mask, dtype=torch.bool)]
    for of_action, of_latent, of_done in zip(action_noise, latent_noise, done_noise, strict=True):
        log_probs, values = agent.policy_and_value(z)
        actions = (log_probs + of_action).argmax(-1)  # a ~ π̄(·|z)
        next_z = agent.transition_model(z, actions, of_latent)  # z̄' ~ P̄(·|z, a)
        is_done.append(agent.done_model(next_z) + of_done > 0)  # with the probability that z̄' is terminal
        steps.append((z, actions, agent.reward_model(z, actions), log_probs, values))
        z = torch.where(is_done[-1][:, None, None], z, next_z)
    zs, actions, rewards, log_probs, values = map(torch.stack, zip(*steps, strict=True))
    values, is_done = torch.cat((values, agent.policy_and_value(z)[1][None])), torch.stack(is_done)  # (H + 1, B)
    targets = compute_gae(rewards, values, is_done, is_done, args.gamma, args.gae_lambda)
    return Transitions(zs, actions, rewards, log_probs, *targets, is_done[1:].float(), mask.expand_as(rewards))


def make_optimizer(agent: Agent, args: Args) -> torch.optim.Adam:
    """Adam over all parts of the agent: a group for each, which knows its name and its first learning rate."""
    rates = dict.fromkeys(MODEL, args.learning_rate) | dict.fromkeys(BEHAVIOUR, args.behaviour_learning_rate)
    groups = [{"params": part, "name": n, "lr": rates[n], "first_lr": rates[n]} for n, part in agent.parts().items()]
    return torch.optim.Adam(groups, eps=1e-5, fused=True)


def optimizer_step(
    optimizer: torch.optim.Adam, loss: Tensor, names: tuple[str, ...], max_grad_norm: float
) -> dict[str, Tensor]:
    """Move these parts, and only them, by the gradient at current weights, each clipped by its own norm; the norms."""
    parts = {group["name"]: group["params"] for group in optimizer.param_groups if group["name"] in names}
    optimizer.zero_grad()
    loss.backward(inputs=[parameter for part in parts.values() for parameter in part])
    norms = {}
    for name, part in parts.items():
        squares = [torch.linalg.vector_norm(p.grad, dtype=torch.float64).square() for p in part]  # float32 loses digits
        norms[f"losses/grad_norm_{name}"] = norm = torch.stack(squares).sum().sqrt().float()
        torch._foreach_mul_([parameter.grad for parameter in part], (max_grad_norm / norm).clamp(max=1))
    optimizer.step()
    return norms


def planning_stats(
    agent: Agent, dreams: Transitions, real_returns: Tensor, real_ends: Tensor, real_mask: Tensor, gamma: float
) -> dict[str, Tensor]:
    """How true the dreams are, and how far the actor moved on them. Raises FloatingPointError if it is not finite.

    Ends per step, beside real_ends (T, N); λ-returns, beside real_returns (B,) of the same starts. The theorem wants
    π̄ in N^{1/γ}(π̄_b): the largest ratio, the mean over states of each one's largest, the share of states inside.
    """
    log_probs, values = agent.policy_and_value(dreams.obs.flatten(0, 1))
    if not (log_probs.isfinite().all() and values.isfinite().all()):  # after the last step, which no loss has seen
        raise FloatingPointError("not finite: log_probs or value, after the update")
    ratios = (log_probs.view_as(dreams.old_log_probs) - dreams.old_log_probs).exp()
    ratios = torch.where(dreams.mask[..., None] > 0, ratios, 1.0)
    is_inside = ((ratios <= 1 / gamma) & (ratios >= 2 - 1 / gamma)).all(-1)
    returns, is_real = dreams.returns[0], dreams.mask[0]
    return {
        "imagination/done_rate": masked_mean(dreams.next_is_terminal, dreams.mask),
        "imagination/real_done_rate": masked_mean(real_ends, real_mask),
        "imagination/return": masked_mean(returns, is_real),
        "imagination/real_return": masked_mean(real_returns, is_real),
        "imagination/return_error": masked_mean((returns - real_returns).abs(), is_real),
        "spi/planning_ratio_max": ratios.max(),
        "spi/planning_ratio_mean": masked_mean(ratios.amax(-1), dreams.mask),
        "spi/planning_inside": masked_mean(is_inside.float(), dreams.mask),
    }


def latent_stats(agent: Agent, z: Tensor, is_terminal: Tensor, is_last: Tensor) -> dict[str, Tensor]:
    """Of latents z ((T + 1) N, V, C): dead classes, entropy (nats) of a variable, share of terminal states told."""
    usage, log_odds = z[~is_last.flatten()].mean(0), agent.done_model(z[is_terminal.flatten()])  # (V, C)
    stats = {"dead_classes": (usage == 0).float().mean(), "latent_entropy": torch.special.entr(usage).sum(-1).mean()}
    stats |= {"done_accuracy_last": (log_odds > 0).float().mean()} if len(log_odds) else {}
    return {f"world_model/{name}": value for name, value in stats.items()}


# ==== 5. Training =====================================================================================================


def train(args: Args) -> None:
    """Play a rollout; learn φ and the world model from it; learn to act in imagination; again and again."""
    T, N, L = args.num_steps, args.num_envs, args.chunk_length
    torch.set_num_threads(1)  # layers this small gain nothing from a second, and wait for it where a core is busy
    H, B, z_shape = args.horizon, args.imagination_starts or T * N, (NUM_VARIABLES, NUM_CLASSES)
    run, num_iterations = Run(args), args.total_timesteps // (T * N)
    device, autocast = args.device, torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")

    torch.manual_seed(args.seed)
    games = Games(args, run.iterations)
    agent = Agent(games.num_inputs, games.num_actions).to(device)
    optimizer = make_optimizer(agent, args)
    reward_scaler = RewardScaler(N, args.gamma)
    learned = {"agent": agent, "optimizer": optimizer, "reward_scaler": reward_scaler}
    if run.state:
        torch.set_rng_state(run.state["rng"])
        for name, part in learned.items():
            part.load_state_dict(run.state[name])

    # Observations, policies and values live on the device; the rest, like the games, on the CPU.
    obs = torch.zeros((T + 1, N, games.num_inputs), device=device)
    log_probs = torch.zeros((T, N, games.num_actions), device=device)
    values = torch.zeros((T + 1, N), device=device)
    actions = torch.zeros((T, N), dtype=torch.int64)
    rewards = torch.zeros((T, N))
    is_terminal, is_last = torch.zeros((2, T + 1, N), dtype=torch.bool)  # obs[t]: its value is 0; it ends an episode
    obs[T] = games.reset()

    for iteration in range(run.iterations, num_iterations):
        # ---- Rollout
        for group in optimizer.param_groups:
            group["lr"] = (1 - iteration / num_iterations) * group["first_lr"]
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
        scaled = reward_scaler.scale(rewards, is_last)
        advantages, returns = compute_gae(scaled, values.cpu(), is_terminal, is_last, args.gamma, args.gae_lambda)
        mask, ends = (~is_last[:T]).float(), is_terminal[1:].float()
        of_steps = [x.to(device) for x in (actions, scaled, log_probs, advantages, returns, ends, mask)]

        # ---- Update of φ and the world model, on real data
        for _ in range(args.update_epochs):
            model_stats = []
            for chunks in torch.randperm(N * T // L).chunk(args.num_minibatches):
                # Chunk c is L steps of environment c % N, from step c // N * L on, and the observation after them.
                t = chunks[:, None] // N * L + torch.arange(L + 1)
                rows = t * N + chunks[:, None] % N  # (M / L, L + 1), of the (T + 1) N observations
                if not mask.flatten()[rows[:, :L]].any():
                    continue  # dummies alone: nothing to learn from
                steps, rows = rows[:, :L].flatten().to(device), rows.to(device)
                chunk_obs = obs.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
                batch = Transitions(chunk_obs, *(x.flatten(0, 1)[steps] for x in of_steps))
                with autocast:
                    loss, stats = model_loss(agent, batch, gumbel(len(steps), *z_shape).to(device), args)
                model_stats.append(stats | optimizer_step(optimizer, loss, MODEL, args.max_grad_norm))

        # ---- Imagination, from the new latents
        starts = torch.randperm(T * N)[:B]
        noise = gumbel(H, B, games.num_actions), gumbel(H, B, *z_shape), torch.rand(H, B).logit()
        with torch.no_grad(), autocast:
            z = agent.encode(obs.flatten(0, 1))  # ((T + 1) N, V, C)
            imagined = imagine(agent, *(x.to(device) for x in (z[starts], mask.flatten()[starts], *noise)), args)

        # ---- Update of actor and critic, on what is imagined
        for _ in range(args.imagination_epochs):
            behaviour_stats = []
            for rows in torch.randperm(H * B).chunk(H * args.num_minibatches):
                if not mask.flatten()[starts[rows % B]].any():
                    continue
                batch = Transitions(*(x.flatten(0, 1).index_select(0, rows.to(device)) for x in imagined))
                with autocast:
                    loss, stats = compute_loss(agent, batch, batch.obs, 0.0, args.imagination_clip_coef, args)
                behaviour_stats.append(stats | optimizer_step(optimizer, loss, BEHAVIOUR, args.max_grad_norm))

        # ---- Logging, of the last epochs
        with torch.no_grad(), autocast:
            stats = latent_stats(agent, z, is_terminal, is_last)
            stats |= planning_stats(agent, imagined, returns.flatten()[starts].to(device), ends, mask, args.gamma)
        metrics = {name: value.item() for name, value in stats.items()}
        for rows, prefix in ((behaviour_stats, "imagination"), (model_stats, "losses")):
            table = {name: torch.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())}
            ratios = table.pop("spi/ratios", torch.ones(1)).cpu()
            metrics |= {name.replace("losses", prefix): column.mean().item() for name, column in table.items()}
        metrics["spi/ratio_min"], metrics["spi/ratio_max"] = ratios.min().item(), ratios.max().item()
        metrics["losses/explained_variance"] = explained_variance(values[:T].cpu(), returns, mask).item()
        metrics["losses/weight_norm"] = nn.utils.get_total_norm(agent.parameters()).item()
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
