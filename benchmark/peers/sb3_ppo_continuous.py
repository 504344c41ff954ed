"""Stable-Baselines3's PPO on the same EnvPool environments with continuous actions: --env-id Hopper-v4

The check of `deep_spi_ppo_continuous.py` without its world model: the same settings, networks of the same sizes,
observations and rewards normalised, by SB3's own VecNormalize. It needs Stable-Baselines3 (requirements-benchmark.txt).
The run's folder is that of the scripts, without what evaluate.py would need. What stays different is SB3's own: see
`sb3_ppo.py`; and its running statistics change with each step, ours with each rollout.
"""

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import deep_spi_ppo_continuous
from benchmark.common import speak_utf8
from benchmark.peers.sb3_ppo import EnvPoolVecEnv, Log
from deep_spi_ppo_continuous import Run


@dataclass
class Args(deep_spi_ppo_continuous.Args):
    """The script's arguments; what SB3 has no equal of must be off."""

    reward_loss_coef: float = 0.0  # SB3 has no world model
    transition_loss_coef: float = 0.0

    def __post_init__(self):
        """Also refuse what SB3 has no equal of. Raises SystemExit(2) after one line on stderr."""
        super().__post_init__()
        self.check("precision", self.precision == "fp32", "SB3 computes in fp32")
        self.check("chunk_length", self.chunk_length == 1, "SB3 samples single transitions: 1")
        self.check("track", not self.track, "SB3's metrics are not logged here")
        for name in ("reward_loss_coef", "transition_loss_coef"):
            self.check(name, getattr(self, name) == 0, "SB3 has no world model: 0")


class VectorVecEnv(EnvPoolVecEnv):
    """The script's environments as SB3 wants them."""

    def __init__(self, args: Args):
        self.games, self.render_mode, self.finished = deep_spi_ppo_continuous.Games(args), None, {}
        space = self.games.space
        inputs = gym.spaces.Box(-np.inf, np.inf, (self.games.num_inputs,), np.float32)
        actions = gym.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32))
        VecEnv.__init__(self, args.num_envs, inputs, actions)

    def reset(self):
        return self.games.reset().numpy()

    def step_wait(self):
        obs, rewards, is_terminal, is_last, self.finished = self.games.step(self.actions)
        obs, infos = obs.numpy(), [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(is_last):  # from these SB3 bootstraps a truncated episode
            infos[i] = {"terminal_observation": obs[i], "TimeLimit.truncated": bool(~is_terminal[i])}
        return obs, rewards.numpy().astype(np.float32), is_last.numpy().copy(), infos


def train(args: Args) -> None:
    """One run with SB3, in a folder like that of the scripts, but without checkpoints."""
    with mock.patch.object(deep_spi_ppo_continuous, "__file__", __file__):  # whose name and copy the folder has
        run = Run(args)
    run.config["versions"]["stable_baselines3"] = stable_baselines3.__version__
    (run.dir / "config.json").write_text(json.dumps(run.config, indent=2) + "\n", encoding="utf-8")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == run.stop:
            signal.signal(number, signal.SIG_DFL)  # nobody here ends an iteration and writes a checkpoint
    envs = VecNormalize(VectorVecEnv(args), gamma=args.gamma)
    rollout = args.num_envs * args.num_steps
    steps = args.total_timesteps // rollout * rollout
    model = PPO(
        "MlpPolicy",  # two layers of 64 with tanh, for the policy and for the value
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
    envs.venv.close()


if __name__ == "__main__":
    speak_utf8()
    train(tyro.cli(Args, description=__doc__))
