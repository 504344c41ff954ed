"""What the scripts rely on of EnvPool, and the small things that stand between it and the learner."""

import envpool
import numpy as np
import torch

import deep_spi_ppo


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


def test_observations_become_vectors():
    one_hot = deep_spi_ppo.vectorize(np.array([2, 0], dtype=np.int32), 3)
    assert one_hot.tolist() == [[0, 0, 1], [1, 0, 0]] and one_hot.dtype == np.float32
    flat = deep_spi_ppo.vectorize(np.arange(12, dtype=np.float64).reshape(2, 3, 2), 6)
    assert flat.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]] and flat.dtype == np.float32
