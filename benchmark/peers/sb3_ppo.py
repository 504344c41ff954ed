"""Stable-Baselines3's PPO on the same EnvPool game, same shape: python -m benchmark.peers.sb3_ppo --env-id Pong-v5

The peer that a user would pick, with `ppo_baseline.py`'s settings, so that the two can be compared in speed and in
return. It needs Stable-Baselines3 (requirements-benchmark.txt). The run folder is that of the scripts, and evaluate.py
plays with its policy. What stays different is SB3's own:

- it learns from auto-reset dummies as if they were steps: they count in its losses and in the advantages' mean and
  deviation, and the value of an episode's last frame is trained towards that of the next episode's first;
- minibatches are of independent transitions, and shuffled by another generator;
- advantages are divided by the sample's standard deviation, not the population's;
- float32, frames divided by 255 rather than the first weights, Adam not fused, freed memory given back to the system;
- no checkpoints, no answer to signals or to losses that are not finite.
"""

import csv
import json
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import ppo_baseline
from ppo_baseline import check_env, envpool, make_envs  # noqa: F401 - what evaluate.py looks for in a script

FRAMES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


@dataclass
class Args(ppo_baseline.Args):
    """`ppo_baseline.py`'s arguments; chunk_length and precision must be what SB3 does."""

    precision: str = "fp32"
    """float32, as SB3 has it"""
    chunk_length: int = 1
    """1: independent transitions, as SB3 has it"""


class EnvPoolVecEnv(VecEnv):
    """N EnvPool games as SB3 wants them: rewards clipped to their sign, an info dictionary per game and step."""

    def __init__(self, args: Args):
        self.envs, self.render_mode = ppo_baseline.make_envs(args), None
        super().__init__(args.num_envs, FRAMES, gym.spaces.Discrete(ppo_baseline.check_env(args.env_id)))
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)
        self.dummy = np.zeros(args.num_envs, dtype=bool)
        self.finished = []  # (return, length) of the games that ended in the last step

    def reset(self):
        return self.envs.reset()[0]

    def step_async(self, actions):
        self.actions = actions.astype(np.int32)

    def step_wait(self):
        obs, reward, terminated, truncated, info = self.envs.step(self.actions)
        self.returns += info["reward"]
        self.lengths += ~self.dummy
        self.dummy = terminated | truncated
        over = info["terminated"].astype(bool) | truncated
        self.finished = list(zip(self.returns[over], self.lengths[over], strict=True))
        self.returns[over], self.lengths[over] = 0, 0
        infos = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(self.dummy):  # from these SB3 bootstraps a truncated episode
            infos[i] = {"terminal_observation": obs[i], "TimeLimit.truncated": bool(truncated[i] & ~terminated[i])}
        return obs, np.sign(reward), self.dummy.copy(), infos

    def close(self):
        self.envs.close()

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError("EnvPool's games have no attributes to set")

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
        raise NotImplementedError("EnvPool's games have no methods to call")

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs


class Agent(ActorCriticCnnPolicy):
    """SB3's policy, with the two functions of the scripts' agents that evaluate.py calls."""

    def __init__(self, num_actions: int):
        super().__init__(FRAMES, gym.spaces.Discrete(num_actions), lr_schedule=lambda _: 0.0)

    def encode(self, obs: Tensor) -> Tensor:
        """Features (B, 512) of frames (B, 84, 84, 4) uint8, channels last."""
        return self.extract_features(obs.permute(0, 3, 1, 2))

    def policy_and_value(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, A) of every action, and the value (B,)."""
        return self.action_net(features).log_softmax(-1), self.value_net(features).squeeze(-1)


class Log(BaseCallback):
    """Write episodes.csv and charts/SPS as the scripts do."""

    def __init__(self, run_dir: Path):
        super().__init__()
        self.file = open(run_dir / "episodes.csv", "w", buffering=1, newline="")
        self.episodes = csv.writer(self.file, lineterminator="\n")
        self.episodes.writerow(("global_step", "return", "length"))
        self.writer, self.recent_returns = SummaryWriter(run_dir), deque(maxlen=100)

    def _on_training_start(self):
        self.start_time = time.time()

    def _on_step(self) -> bool:
        for episodic_return, length in self.training_env.finished:
            self.episodes.writerow((self.num_timesteps, episodic_return, length))
            self.recent_returns.append(episodic_return)
        return True

    def _on_rollout_start(self):
        """The end of the update before, if there was one."""
        if self.num_timesteps:
            self.log_speed()

    def log_speed(self):
        sps = self.num_timesteps / (time.time() - self.start_time)
        self.writer.add_scalar("charts/SPS", sps, self.num_timesteps)

    def _on_training_end(self):
        self.log_speed()
        self.file.close()
        self.writer.close()


def check_args(args: Args) -> None:
    """Refuse settings that cannot work, or that SB3 has no equal of. Raises SystemExit(2) after one line on stderr."""
    ppo_baseline.check_args(args)
    ppo_baseline.check(args.precision == "fp32", "precision", args.precision, "SB3 computes in fp32")
    ppo_baseline.check(args.chunk_length == 1, "chunk_length", args.chunk_length, "SB3 samples single transitions: 1")
    ppo_baseline.check(not args.resume, "resume", args.resume, "SB3 keeps no checkpoints here")
    ppo_baseline.check(not args.track, "track", args.track, "SB3's metrics are not logged here")
    ppo_baseline.check(not args.compile, "compile", args.compile, "SB3 is run as it is")


def train(args: Args) -> None:
    """One run with SB3."""
    check_args(args)
    run_dir = ppo_baseline.make_run_dir(args)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    run = ppo_baseline.describe_run(args, device, "fp32")
    run["script"], run["script_path"] = Path(__file__).name, str(Path(__file__).resolve())
    run["versions"]["stable_baselines3"] = stable_baselines3.__version__
    (run_dir / "config.json").write_text(json.dumps(run, indent=2) + "\n")
    envs = EnvPoolVecEnv(args)
    batch_size = args.num_envs * args.num_steps
    steps = args.total_timesteps // batch_size * batch_size
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 on CUDA too
    model = PPO(
        "CnnPolicy",
        envs,
        learning_rate=lambda remaining: (
            (remaining + batch_size / steps) * args.learning_rate
        ),  # SB3's is an update late
        n_steps=args.num_steps,
        batch_size=batch_size // args.num_minibatches,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef / 2,  # SB3's value loss is the mean square without the half
        max_grad_norm=args.max_grad_norm,
        policy_kwargs={"optimizer_kwargs": {"eps": 1e-5}},
        seed=args.seed % 2**32,
        device=device,
    )
    log = Log(run_dir)
    start_time = time.time()
    model.learn(steps, callback=log)
    minutes = (time.time() - start_time) / 60
    torch.save(model.policy.state_dict(), run_dir / "agent.pt")
    envs.close()
    mean_return = f"{np.mean(log.recent_returns):.2f}" if log.recent_returns else "no episode yet"
    print(f"{args.env_id}: mean return of the last {len(log.recent_returns)} episodes: {mean_return}")
    print(f"{steps:,} steps at {steps / minutes / 60:,.0f} per second, {minutes:.1f} minutes; {run_dir}")


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
