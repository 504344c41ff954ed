"""Stable-Baselines3's PPO on the same EnvPool game, same shape: python -m benchmark.peers.sb3_ppo --env-id Pong-v5

The peer that a user would pick, with `ppo_baseline.py`'s settings, so that the two can be compared in speed and in
return. It needs Stable-Baselines3 (requirements-benchmark.txt). The run folder is that of the scripts, and evaluate.py
plays with its policy. What stays different is SB3's own:

- it learns from auto-reset dummies as if they were steps: they count in its losses and in the advantages' mean and
  deviation, and the value of an episode's last frame is trained towards that of the next episode's first;
- minibatches are of independent transitions, and shuffled by another generator;
- advantages are divided by the sample's standard deviation, not the population's;
- float32, frames divided by 255 rather than the first weights, Adam not fused, freed memory given back to the system;
- no checkpoints (but the policies on the way), no answer to signals or to losses that are not finite.
"""

import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import ppo_baseline
from benchmark.common import speak_utf8
from benchmark.launch import policies
from ppo_baseline import Games, Run

FRAMES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


@dataclass
class Args(ppo_baseline.Args):
    """`ppo_baseline.py`'s arguments; chunk_length, precision and track must be what SB3 does."""

    precision: str = "fp32"  # float32, as SB3 has it
    chunk_length: int = 1  # 1: independent transitions, as SB3 has it

    def __post_init__(self):
        """Also refuse what SB3 has no equal of. Raises SystemExit(2) after one line on stderr."""
        super().__post_init__()
        self.check("precision", self.precision == "fp32", "SB3 computes in fp32")
        self.check("chunk_length", self.chunk_length == 1, "SB3 samples single transitions: 1")
        self.check("track", not self.track, "SB3's metrics are not logged here")


class EnvPoolVecEnv(VecEnv):
    """The baseline's games as SB3 wants them: channels first, and an info dictionary per game and step."""

    def __init__(self, args: Args):
        self.games, self.render_mode = Games(args), None
        super().__init__(args.num_envs, FRAMES, gym.spaces.Discrete(self.games.num_actions))
        self.finished = {}  # environment -> return and length of the game that ended in the last step

    def reset(self):
        return self.games.reset().permute(0, 3, 1, 2).numpy()

    def step_async(self, actions):
        self.actions = torch.from_numpy(actions)

    def step_wait(self):
        obs, rewards, is_terminal, is_last, self.finished = self.games.step(self.actions)
        obs, is_terminal, is_last = obs.permute(0, 3, 1, 2).numpy(), is_terminal.numpy(), is_last.numpy()
        infos = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(is_last):  # from these SB3 bootstraps a truncated episode
            infos[i] = {"terminal_observation": obs[i], "TimeLimit.truncated": bool(~is_terminal[i])}
        return obs, rewards.numpy(), is_last.copy(), infos

    def close(self):
        self.games.envs.close()

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

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    def _on_training_start(self):
        self.start_time = time.time()

    def _on_step(self) -> bool:
        self.run.log_episodes(self.num_timesteps, self.training_env.finished)
        return True

    def _on_rollout_start(self):
        """The end of the update before, if there was one."""
        if self.num_timesteps:
            self.log_speed()

    def log_speed(self):
        sps = self.num_timesteps / (time.time() - self.start_time)
        self.run.bar.update(self.num_timesteps - self.run.bar.n)
        self.run.writer.add_scalar("charts/SPS", sps, self.num_timesteps)
        if self.num_timesteps in policies.kept_steps(vars(self.run.args)):
            policies.keep(self.run.dir, self.num_timesteps, self.model.policy.state_dict())

    def _on_training_end(self):
        self.log_speed()
        self.run.writer.flush()


def open_run(script: ModuleType, file: str, args: object) -> Run:
    """The run's folder as the script makes it, with the name and the copy of the peer that is this file."""
    with mock.patch.object(script, "__file__", file):
        run = script.Run(args)
    run.config["versions"]["stable_baselines3"] = stable_baselines3.__version__
    (run.dir / "config.json").write_text(json.dumps(run.config, indent=2) + "\n", encoding="utf-8")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == run.stop:
            signal.signal(number, signal.SIG_DFL)  # nobody here ends an iteration and writes a checkpoint
    return run


def learn(policy: str, envs: VecEnv, args: object, run: Run) -> None:
    """Train SB3's PPO with the script's settings, and write its weights."""
    rollout = args.num_envs * args.num_steps
    steps = args.total_timesteps // rollout * rollout
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 on CUDA too
    model = PPO(
        policy,
        envs,
        learning_rate=lambda remaining: (remaining + rollout / steps) * args.learning_rate,  # SB3's is an update late
        n_steps=args.num_steps,
        batch_size=rollout // args.num_minibatches,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef / 2,  # SB3's value loss is the mean square without the half
        max_grad_norm=args.max_grad_norm,
        policy_kwargs={"optimizer_kwargs": {"eps": 1e-5}},
        seed=args.seed % 2**32,
        device=args.device,
    )
    model.learn(steps, callback=Log(run))
    torch.save(model.policy.state_dict(), run.dir / "agent.pt")
    run.bar.close()


def train(args: Args) -> None:
    """One run with SB3, in a folder like that of the scripts, but without checkpoints."""
    run, envs = open_run(ppo_baseline, __file__, args), EnvPoolVecEnv(args)
    learn("CnnPolicy", envs, args, run)
    envs.close()


if __name__ == "__main__":
    speak_utf8()
    train(tyro.cli(Args, description=__doc__))
