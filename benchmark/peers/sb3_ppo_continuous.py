"""Stable-Baselines3's PPO on the same EnvPool environments with continuous actions: --env-id Hopper-v4

The check of `deep_spi_ppo_continuous.py` without its world model: the same settings, networks of the same sizes,
observations and rewards normalised, by SB3's own VecNormalize. It needs Stable-Baselines3 (requirements-benchmark.txt).
The run's folder is that of the scripts, without what evaluate.py would need. What stays different is SB3's own: see
`sb3_ppo.py`; and its running statistics change with each step, ours with each rollout, and count the rows that only
reset (less than 2 % of them). The settings are our script's, which are neither SB3's defaults nor those of its zoo.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also starts as a file, as benchmark.run does
import deep_spi_ppo_continuous
from benchmark.common import speak_utf8
from benchmark.peers.sb3_ppo import EnvPoolVecEnv, learn, open_run


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
    run = open_run(deep_spi_ppo_continuous, __file__, args)
    envs = VecNormalize(VectorVecEnv(args), gamma=args.gamma)
    learn("MlpPolicy", envs, args, run)  # two layers of 64 with tanh, for the policy and for the value
    envs.venv.close()


if __name__ == "__main__":
    speak_utf8()
    train(tyro.cli(Args, description=__doc__))
