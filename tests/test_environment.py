"""What the scripts rely on of EnvPool, and the small things that stand between it and the learner."""

import envpool
import numpy as np
import torch

import deep_spi_ppo
import deep_spi_ppo_atari


def test_environment_streams_of_two_seeds_never_overlap():
    seeds = [env_seed for seed in range(200) for env_seed in deep_spi_ppo.env_seeds(seed, 128)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= env_seed < 2**31 for env_seed in seeds)


def test_dummy_rows_are_where_the_scripts_expect_them():
    """After an end comes one row whose action is ignored: reward 0, no end, and the first frame of a new episode."""
    args = deep_spi_ppo.Args(num_envs=4)
    envs = deep_spi_ppo.make_envs(args)
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


def test_atari_episodes_are_whole_games_with_unclipped_returns():
    """A game's return sums raw rewards over all its lives, as EnvPool's own counters have it."""
    args = deep_spi_ppo_atari.Args(env_id="Breakout-v5", num_envs=4, seed=5, noop_max=30)
    envs = deep_spi_ppo_atari.make_envs(args)
    envs.reset()
    recorder = deep_spi_ppo_atari.EpisodeRecorder(4)
    random = np.random.default_rng(0)
    raw, steps, lives_lost = np.zeros(4), np.zeros(4, dtype=int), np.zeros(4, dtype=int)
    done, games = np.zeros(4, dtype=bool), []
    for _ in range(1500):
        _, _, terminated, truncated, info = envs.step(random.integers(0, 4, 4).astype(np.int32))
        dummy, done = done, terminated | truncated
        raw += info["reward"]
        steps += ~dummy
        over = info["terminated"].astype(bool) | truncated
        lives_lost += terminated
        ended = recorder.step(info["reward"], over, dummy)
        assert len(ended) == over.sum()
        for (episodic_return, length), i in zip(ended, np.flatnonzero(over), strict=True):
            assert episodic_return == raw[i] and length == steps[i]
            assert lives_lost[i] == 5  # Breakout has five lives, each of which ends an episode for the learner
            games.append(episodic_return)
        raw[over], steps[over], lives_lost[over] = 0, 0, 0
    assert len(games) >= 4 and max(games) > 0


def test_reward_scaler_divides_by_the_deviation_of_the_discounted_return():
    random = np.random.default_rng(0)
    scaler = deep_spi_ppo.RewardScaler(3, 0.9, torch.device("cpu"))
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
    scaler = deep_spi_ppo.RewardScaler(2, 0.99, torch.device("cpu"))
    assert (scaler.scale(torch.zeros(8, 2), torch.zeros(9, 2, dtype=torch.bool)) == 0).all()


def test_sticky_actions_repeat_what_was_executed_and_never_in_the_first_step():
    sticky = deep_spi_ppo.StickyActions(10_000, 0.25, seed=0)
    first = sticky.step(np.full(10_000, 1), first=np.ones(10_000, dtype=bool))
    assert (first == 1).all()
    second = sticky.step(np.full(10_000, 2), first=np.zeros(10_000, dtype=bool))
    assert abs((second == 1).mean() - 0.25) < 0.02
    third = sticky.step(np.full(10_000, 3), first=np.zeros(10_000, dtype=bool))
    assert abs((third == 1).mean() - 0.25**2) < 0.01 and abs((third == 2).mean() - 0.75 * 0.25) < 0.02
    assert (sticky.step(np.full(10_000, 4), first=np.ones(10_000, dtype=bool)) == 4).all()


def test_observations_become_vectors():
    one_hot = deep_spi_ppo.vectorize(np.array([2, 0], dtype=np.int32), 3)
    assert one_hot.tolist() == [[0, 0, 1], [1, 0, 0]] and one_hot.dtype == np.float32
    flat = deep_spi_ppo.vectorize(np.arange(12, dtype=np.float64).reshape(2, 3, 2), 6)
    assert flat.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]] and flat.dtype == np.float32
