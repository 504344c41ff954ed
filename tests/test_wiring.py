"""Does the training loop hand the learner what happened? Runs are recorded at the environment and compared there.

The encoder is replaced by the identity, so that the latents z and z' that reach the loss are the observations.
"""

import csv

import numpy as np
import pytest
import torch

import deep_spi_ppo
import ppo_baseline


class Recorder:
    """An environment that writes down what goes in and out of it."""

    def __init__(self, envs):
        self.envs, self.log = envs, []

    def reset(self):
        obs, info = self.envs.reset()
        self.first_obs = obs
        return obs, info

    def step(self, actions):
        step = self.envs.step(actions)
        self.log.append((actions.copy(), *(array.copy() for array in step[:4]), step[4]))
        return step

    def history(self):
        """obs (S+1, N, ...), then (S, N) each: actions, rewards, terminated, truncated; dummy: obs[s] was an end."""
        actions, obs, rewards, terminated, truncated, _ = (list(column) for column in zip(*self.log, strict=True))
        ends = np.array(terminated) | np.array(truncated)
        dummy = np.concatenate((np.zeros_like(ends[:1]), ends[:-1]))
        arrays = (np.array(x) for x in ([self.first_obs, *obs], actions, rewards, terminated, truncated))
        return *arrays, dummy


def record(script, monkeypatch, tmp_path, args):
    """Run `script.train(args)`; return its environment's recorder, and what compute_loss and compute_gae were given."""
    made, losses, gaes = [], [], []
    Games, compute_loss, compute_gae = script.Games, script.compute_loss, script.compute_gae

    class RecordedGames(Games):
        def __init__(self, *args):
            super().__init__(*args)
            self.envs = Recorder(self.envs)
            made.append(self.envs)

    def recorded_loss(*inputs):
        losses.append(inputs)
        return compute_loss(*inputs)

    def recorded_gae(*inputs):
        gaes.append([x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
        return compute_gae(*inputs)

    monkeypatch.setattr(script, "Games", RecordedGames)
    monkeypatch.setattr(script, "compute_loss", recorded_loss)
    monkeypatch.setattr(script, "compute_gae", recorded_gae)
    args.run_dir, args.device = str(tmp_path / "run"), "cpu"
    script.train(args)
    return made[0], losses, gaes


def read_episodes(tmp_path):
    with open(tmp_path / "run" / "episodes.csv") as file:
        return [(int(step), float(value), int(length)) for step, value, length in list(csv.reader(file))[1:]]


@pytest.mark.parametrize("chunk_length", [8, 1])
@pytest.mark.parametrize("env_id, ends", [("CartPole-v1", "terminated"), ("MountainCar-v0", "truncated")])
@pytest.mark.parametrize("sticky", [0.0, 0.5])
def test_minibatches_are_what_happened(env_id, ends, sticky, chunk_length, monkeypatch, tmp_path):
    num_inputs = {"CartPole-v1": 4, "MountainCar-v0": 2}[env_id]
    identity = lambda _, obs: torch.nn.functional.pad(obs, (0, 32 - num_inputs))  # noqa: E731
    monkeypatch.setattr(deep_spi_ppo.Agent, "encode", identity)
    monkeypatch.setattr(deep_spi_ppo.RewardScaler, "scale", lambda _, rewards, is_last: rewards.clone())
    T, N, iterations = 64, 4, 4
    args = deep_spi_ppo.Args(
        env_id=env_id, num_envs=N, num_steps=T, total_timesteps=T * N * iterations, sticky=sticky,
        chunk_length=chunk_length, num_minibatches=4, update_epochs=1, seed=11,
    )  # fmt: skip
    envs, losses, gaes = record(deep_spi_ppo, monkeypatch, tmp_path, args)
    obs, executed, rewards, terminated, truncated, dummy = envs.history()
    assert {"terminated": terminated, "truncated": truncated}[ends].any() and dummy.any()

    # What the advantages are made of, iteration by iteration.
    assert len(gaes) == iterations
    for i, (gae_rewards, values, is_terminal, is_last, gamma, gae_lambda) in enumerate(gaes):
        rows = slice(i * T, (i + 1) * T)
        assert values.shape == is_terminal.shape == is_last.shape == (T + 1, N)
        np.testing.assert_array_equal(gae_rewards, rewards[rows])
        np.testing.assert_array_equal(is_terminal[1:], terminated[rows])
        np.testing.assert_array_equal(is_last[:T], dummy[rows])
        np.testing.assert_array_equal(is_last[1:], (terminated | truncated)[rows])
        assert (gamma, gae_lambda) == (args.gamma, args.gae_lambda)

    # What the losses are made of: each row of each minibatch is one step, found by its observation.
    step_of = {obs[s, n].tobytes(): (s, n) for s in range(T * iterations) for n in range(N)}
    assert len(step_of) == T * iterations * N
    seen, choices = set(), {}
    for k, (agent, batch, _, noise) in enumerate(losses):
        iteration = k // args.num_minibatches
        z, next_z = deep_spi_ppo.latents(agent, batch)
        assert noise.shape == (*z.shape, 5) and noise.abs().max() == 1 and abs(noise.mean()) < 0.05
        for other_k, other in enumerate(losses):  # the noise is drawn anew in every iteration, and only then
            assert torch.equal(noise, other[3]) == (other_k // args.num_minibatches == iteration)
        values = gaes[iteration][1]
        for row in range(len(z)):
            s, n = step_of[z[row, :num_inputs].numpy().tobytes()]
            assert s // T == iteration and (s, n) not in seen
            seen.add((s, n))
            choices[s, n] = batch.actions[row].item()
            assert (
                next_z[row, :num_inputs].numpy().tobytes() == obs[s + 1, n].tobytes()
            )  # the true next one, even at an end
            assert batch.rewards[row] == rewards[s, n]
            assert batch.mask[row] == (not dummy[s, n])
            torch.testing.assert_close(
                batch.returns[row] - batch.advantages[row], values[s % T, n], rtol=1e-4, atol=1e-4
            )
    assert len(seen) == T * iterations * N  # every step once, in the one epoch

    # Sticky actions: what was executed is what was chosen or what was executed before; never repeated in a first step.
    repeated = real = 0
    for s in range(1, T * iterations):
        for n in range(N):
            if dummy[s, n]:
                continue
            if dummy[s - 1, n]:
                assert executed[s, n] == choices[s, n]
            elif executed[s - 1, n] != choices[s, n]:
                real += 1
                repeated += executed[s, n] != choices[s, n]
                assert executed[s, n] in (choices[s, n], executed[s - 1, n])
    assert real > 100
    assert abs(repeated / real - sticky) < (0.12 if sticky else 1e-9)

    # Episodes, counted again.
    expected = []
    for n in range(N):
        episode_return = length = 0
        for s in range(T * iterations):
            if not dummy[s, n]:
                episode_return, length = episode_return + rewards[s, n], length + 1
            if terminated[s, n] or truncated[s, n]:
                expected.append(((s + 1) * N, episode_return, length))
                episode_return = length = 0
    assert sorted(read_episodes(tmp_path)) == sorted(expected)


def test_atari_episodes_are_whole_games_with_unclipped_returns(monkeypatch, tmp_path):
    """A game of SpaceInvaders has three lives: three ends for the learner, who sees clipped rewards; one episode."""
    N, T, iterations = 4, 100, 12
    args = ppo_baseline.Args(
        env_id="SpaceInvaders-v5", num_envs=N, num_steps=T, total_timesteps=N * T * iterations, chunk_length=100,
        num_minibatches=1, update_epochs=1, seed=5, precision="fp32",
    )  # fmt: skip
    envs, losses, gaes = record(ppo_baseline, monkeypatch, tmp_path, args)
    _, _, rewards, terminated, truncated, dummy = envs.history()
    raw = np.array([info["reward"] for *_, info in envs.log])
    game_over = np.array([info["terminated"] for *_, info in envs.log]).astype(bool) | truncated
    assert (raw[dummy] == 0).all() and raw.max() > 1  # invaders are worth 5 and more
    expected = []
    for n in range(N):
        start = 0
        for s in np.flatnonzero(game_over[:, n]):
            game = slice(start, s + 1)
            assert terminated[game, n].sum() == 3
            expected.append(((s + 1) * N, raw[game, n].sum(), (~dummy[game, n]).sum()))
            start = s + 1
    assert len(expected) >= 4
    assert sorted(read_episodes(tmp_path)) == sorted(expected)
    learned = torch.cat([gae[0] for gae in gaes]).numpy()
    np.testing.assert_array_equal(learned, np.sign(rewards))
    assert sum(batch.mask.sum().item() for _, batch, _ in losses) == (~dummy).sum()


def test_frames_reach_the_encoder_as_they_were_seen(monkeypatch, tmp_path):
    """The update encodes the rollout's frames: (N, 4, 84, 84) from the games, channels last for it."""
    args = ppo_baseline.Args(
        num_envs=4, num_steps=8, total_timesteps=64, num_minibatches=2, update_epochs=1, seed=3, precision="fp32"
    )
    encode, updates = ppo_baseline.Agent.encode, []

    def recorded(agent, obs):
        if torch.is_grad_enabled():
            updates.append(obs.clone())
        return encode(agent, obs)

    monkeypatch.setattr(ppo_baseline.Agent, "encode", recorded)
    envs, _, _ = record(ppo_baseline, monkeypatch, tmp_path, args)
    seen = envs.history()[0]  # (17, 4, 4, 84, 84)
    for iteration in range(2):
        ours = torch.cat(updates[2 * iteration : 2 * iteration + 2]).permute(0, 3, 1, 2).numpy()
        theirs = seen[8 * iteration : 8 * iteration + 8].reshape(-1, 4, 84, 84)
        assert sorted(frames.tobytes() for frames in ours) == sorted(frames.tobytes() for frames in theirs)
