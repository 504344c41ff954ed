"""What the scripts rely on of EnvPool, and the small things that stand between it and the learner."""

import envpool
import numpy as np
import pytest
import torch

import deep_spi_ppo
import ppo_baseline

pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")  # EnvPool's own spaces


def test_environment_streams_of_two_seeds_never_overlap(monkeypatch):
    seeds, make = [], envpool.make

    def recorded(*names, env_seed, **settings):
        seeds.extend(env_seed)
        return make(*names, env_seed=env_seed[:1], **(settings | {"num_envs": 1, "num_threads": 1}))

    monkeypatch.setattr(deep_spi_ppo, "what_is_wrong", lambda _: "")  # which makes an environment of its own
    monkeypatch.setattr("envpool.make", recorded)
    for seed in range(50):
        for start in (0, 3):  # a run that goes on after three iterations has streams of its own
            deep_spi_ppo.Games(deep_spi_ppo.Args(seed=seed, num_envs=128), start)
    assert len(set(seeds)) == len(seeds) == 50 * 2 * 128
    assert all(0 <= env_seed < 2**31 for env_seed in seeds)


def test_dummy_rows_are_where_the_scripts_expect_them():
    """After an end comes one row whose action is ignored: reward 0, no end, and the first frame of a new episode."""
    args = deep_spi_ppo.Args(num_envs=4)
    envs = deep_spi_ppo.Games(args).envs
    obs, _ = envs.reset()
    done, ends = np.zeros(4, dtype=bool), 0
    for _ in range(200):
        last_obs = obs
        obs, reward, terminated, truncated, _ = envs.step(np.ones(4, dtype=np.int32))
        assert (reward[done] == 0).all() and (reward[~done] == 1).all()
        assert not (terminated | truncated)[done].any()
        assert (np.abs(obs[done]) <= 0.05).all()  # CartPole starts within ±0.05
        assert (np.abs(last_obs[done]).max(axis=-1, initial=0) > 0.05).all()  # and the row before was the true end
        done = terminated | truncated
        ends += done.sum()
    assert ends > 20


def test_time_limit_is_a_truncation_with_its_true_last_observation():
    envs = envpool.make("MountainCar-v0", env_type="gymnasium", num_envs=1, env_seed=[7])
    obs, _ = envs.reset()
    for step in range(1, 201):
        last_obs = obs
        obs, _, terminated, truncated, _ = envs.step(np.zeros(1, dtype=np.int32))
        assert not terminated[0] and truncated[0] == (step == 200)
    assert abs(obs[0, 0] - last_obs[0, 0]) < 0.1  # the car has moved on, it was not reset
    assert obs[0, 1] != 0.0


def test_reward_scaler_divides_by_the_deviation_of_the_discounted_return():
    random = np.random.default_rng(0)
    scaler = deep_spi_ppo.RewardScaler(3, 0.9)
    discounted, seen = np.zeros(3), []
    dones = np.zeros((17, 3), dtype=bool)
    for _ in range(4):
        dones[0] = dones[-1]
        dones[1:] = (random.random((16, 3)) < 0.2) & ~dones[:-1]  # no end follows an end
        rewards = (random.normal(2, 5, (16, 3)) * ~dones[:-1]).astype(np.float32)
        for t in range(16):
            for n in range(3):
                if dones[t, n]:
                    discounted[n] = 0.0
                else:
                    discounted[n] = 0.9 * discounted[n] + rewards[t, n]
                    seen.append(discounted[n])
        scaled = scaler.scale(torch.from_numpy(rewards), torch.from_numpy(dones))
        expected = np.clip(rewards / np.std(seen), -10, 10)
        np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-5)


def test_reward_scaler_survives_rewards_that_are_all_0():
    scaler = deep_spi_ppo.RewardScaler(2, 0.99)
    assert (scaler.scale(torch.zeros(8, 2), torch.zeros(9, 2, dtype=torch.bool)) == 0).all()


def test_observations_become_vectors():
    games = deep_spi_ppo.Games(deep_spi_ppo.Args(env_id="FrozenLake-v1", num_envs=2))
    one_hot = games.vectorize(np.array([2, 0], dtype=np.int32))
    assert one_hot.dtype == torch.float32 and one_hot.shape == (2, 16)
    assert one_hot.nonzero().tolist() == [[0, 2], [1, 0]]
    games.num_inputs = 6
    flat = games.vectorize(np.arange(12, dtype=np.float64).reshape(2, 3, 2))
    assert flat.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]] and flat.dtype == torch.float32


class RecordedLives:
    """Stands in for EnvPool: rows of (terminated, game over, lives, reward) for one game."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def step(self, _):
        terminated, over, lives, reward = next(self.rows)
        info = {"lives": np.array([lives]), "terminated": np.array([over]), "reward": np.array([reward])}
        no = np.zeros(1, dtype=bool)
        return np.zeros((1, 4, 84, 84), np.uint8), np.array([reward], np.float32), np.array([terminated]), no, info


def test_a_game_also_ends_where_lives_go_up_after_a_lost_life():
    """EnvPool raises no flag if a game ends in the no-ops after a lost life: only the next game's lives tell."""
    games = ppo_baseline.Games(ppo_baseline.Args(env_id="RoadRunner-v5", num_envs=1, num_minibatches=1))
    rows = [(False, 0, 2, 100.0), (True, 0, 1, 0.0), (False, 0, 1, 0.0), (False, 0, 1, 50.0), (True, 0, 0, 7.0)]
    rows += [(False, 0, 3, 0.0), (False, 0, 3, 5.0), (True, 1, 0, 1.0), (False, 0, 3, 0.0)]
    games.envs = RecordedLives(rows)
    ended = [games.step(torch.zeros(1, dtype=torch.int64))[-1] for _ in range(9)]
    assert ended[5] == {0: (157.0, 4)} and ended[7] == {0: (6.0, 2)}  # the first untold, the second told
    assert not any(ended[t] for t in (0, 1, 2, 3, 4, 6, 8))
