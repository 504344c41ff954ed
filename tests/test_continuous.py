"""Deep SPI with continuous actions: densities, neighbourhood, normaliser, losses, games, and what a run promises."""

import ast
import copy
import gc
import math
import os
import re
import signal
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import deep_spi_ppo
import deep_spi_ppo_continuous as script
import evaluate
from benchmark.common import read_events
from deep_spi_ppo_continuous import Agent, Args, Games, Normalizer, Transitions

ROOT = Path(__file__).parent.parent
INPUTS, A = 5, 3  # of the made-up cases: inputs, and numbers in an action
BOX = torch.tensor([[-1.0, -0.4, -2.0], [1.0, 0.4, 2.0]])


def small_args(folder, **changes) -> Args:
    """Six iterations on Pendulum, of two minibatches each."""
    settings = {
        "env_id": "Pendulum-v1", "num_envs": 4, "num_steps": 64, "total_timesteps": 6 * 256, "num_minibatches": 2,
        "update_epochs": 1, "seed": 3, "device": "cpu", "checkpoint_interval": 100, "run_dir": str(folder / "run"),
    }  # fmt: skip
    return Args(**(settings | changes))


def made_up_batch(B=6, L=2, seed=0) -> tuple[Agent, Transitions, torch.Tensor]:
    """An agent whose policy has moved, B chunks of L steps with two dummies among them, and the models' noise."""
    torch.manual_seed(seed)
    agent, M = Agent(INPUTS, BOX), B * L
    with torch.no_grad():
        agent.actor.weight.normal_(std=0.3)
        agent.log_std.normal_(std=0.3)
    agent.normalizer.update(3 + 2 * torch.randn(20, 4, INPUTS), torch.ones(20, 4))
    mask = torch.ones(M)
    mask[[1, 7]] = 0
    batch = Transitions(
        obs=3 + 2 * torch.randn(B, L + 1, INPUTS), actions=1.5 * torch.randn(M, A), rewards=torch.randn(M),
        old_log_probs=torch.zeros(M), advantages=torch.randn(M), returns=torch.randn(M), mask=mask,
    )  # fmt: skip
    with torch.no_grad():
        mean, log_std = agent.policy(script.latents(agent, batch)[0])
        old = script.log_density(batch.actions, mean, log_std) + 0.3 * torch.randn(M)
    return agent, batch._replace(old_log_probs=old), torch.randn(M, *agent.transition_model.noise_shape)


# ---- Densities


@pytest.mark.parametrize("std", [0.01, 1.0, 30.0])
def test_densities_are_those_of_torch(std):
    torch.manual_seed(1)
    mean, log_std = torch.randn(7, 2, A).double(), torch.tensor([0.3, -0.5, 0.1]).double() + math.log(std)
    actions = mean + 4 * std * torch.randn(7, 2, A).double()
    expected = Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    torch.testing.assert_close(script.log_density(actions, mean, log_std), expected)


def test_ratios_and_entropy_are_those_of_torch():
    agent, batch, _ = made_up_batch()
    _, stats = script.compute_loss(agent, batch, Args(), None)
    policy = Normal(agent.actor(script.latents(agent, batch)[0]), agent.log_std.exp())
    ratios = (policy.log_prob(batch.actions).sum(-1) - batch.old_log_probs).exp()
    torch.testing.assert_close(stats["spi/ratios"], torch.where(batch.mask > 0, ratios, 1.0).detach())
    torch.testing.assert_close(stats["losses/entropy"], policy.entropy()[0].sum().detach())
    far = ((ratios - 1).abs() > 0.2) & (batch.mask > 0)
    assert 0 < stats["losses/clipfrac"] == far.sum() / batch.mask.sum() < 1


# ---- Neighbourhood


def normal_cdf(x: float) -> float:
    return statistics.NormalDist().cdf(x)


def share(mean, log_std, new_mean, new_log_std, clip_coef, num_samples=400_000) -> float:
    """share_outside of two policies over one number, in one state that counts and one that does not."""
    torch.manual_seed(0)
    old, new = (
        (torch.tensor([m, 99.0]).view(1, 2, 1), torch.tensor([s]))
        for m, s in ((mean, log_std), (new_mean, new_log_std))
    )
    new[0][0, 1] = -99.0  # the dummy's policies have nothing in common
    return script.share_outside(old, new, torch.tensor([[1.0, 0.0]]), clip_coef, num_samples).item()


@pytest.mark.parametrize("clip_coef", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("shift", [0.05, -0.3, 1.0])
def test_share_outside_when_the_mean_moves(shift, clip_coef):
    """ln r = d ε - ½ d², with d the shift in standard deviations: it leaves [2 - C, C] at two values of ε."""
    d = shift / 0.5
    ends = sorted((math.log(bound) + d * d / 2) / d for bound in (1 - clip_coef, 1 + clip_coef))
    exact = 1 - (normal_cdf(ends[1]) - normal_cdf(ends[0]))
    assert share(1.0, math.log(0.5), 1.0 + shift, math.log(0.5), clip_coef) == pytest.approx(exact, abs=0.004)


@pytest.mark.parametrize("clip_coef", [0.1, 0.2])
@pytest.mark.parametrize("factor", [0.7, 0.95, 1.02, 1.5])
def test_share_outside_when_the_deviation_moves(factor, clip_coef):
    """ln r = ½ ε² (1 - 1/f²) - ln f, with f the factor: inside between two values of ε², symmetric in ε."""
    slope = (1 - factor**-2) / 2
    ends = sorted((math.log(bound) + math.log(factor)) / slope for bound in (1 - clip_coef, 1 + clip_coef))
    low, high = (math.sqrt(max(0.0, end)) for end in ends)
    exact = 1 - 2 * (normal_cdf(high) - normal_cdf(low))
    moved = math.log(0.5) + math.log(factor)
    assert share(1.0, math.log(0.5), 1.0, moved, clip_coef) == pytest.approx(exact, abs=0.004)


def test_share_outside_of_the_same_policy_is_zero_and_of_another_never():
    """A normal policy that differs at all leaves the neighbourhood far out in the tails, though hardly ever there."""
    assert share(0.0, 0.0, 0.0, 0.0, 0.2) == 0
    moved = torch.tensor(1e-3)
    far = torch.tensor([[1000.0]])
    ratio = (script.log_density(far, moved, torch.zeros(1)) - script.log_density(far, 0 * moved, torch.zeros(1))).exp()
    assert ratio > 2 and share(0.0, 0.0, 1e-3, 0.0, 0.2) == 0


def test_share_outside_draws_16_actions_a_state():
    torch.manual_seed(5)
    script.share_outside(
        (torch.zeros(2, 3, 1), torch.zeros(1)), (torch.ones(2, 3, 1), torch.zeros(1)), torch.ones(2, 3), 0.2
    )
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.randn(16, 2, 3, 1)
    assert torch.equal(after, torch.get_rng_state())


# ---- Normaliser


def test_normalizer_is_that_of_numpy():
    rng, normalizer = np.random.default_rng(0), Normalizer(INPUTS)
    seen = []
    for scale in (1.0, 100.0, 0.1):
        obs = (1000 + scale * rng.standard_normal((16, 4, INPUTS))).astype(np.float32)
        obs[..., 2] = 7.0  # a number that never changes
        mask = rng.random((16, 4)) < 0.8
        seen.append(obs[mask].astype(np.float64))
        obs[~mask] = 1e9  # a dummy
        normalizer.update(torch.from_numpy(obs), torch.from_numpy(mask).float())
        rows = np.concatenate(seen)
        np.testing.assert_allclose(normalizer.mean, rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(normalizer.std, np.maximum(rows.std(0), 1e-4), rtol=1e-4)
    assert normalizer.sums[0].eq(len(rows)).all() and normalizer.sums.dtype == torch.float64
    given = torch.from_numpy(rows[:50].astype(np.float32))
    expected = np.clip((rows[:50] - rows.mean(0)) / np.maximum(rows.std(0), 1e-4), -10, 10)
    np.testing.assert_allclose(normalizer(given), expected, atol=2e-3)
    assert normalizer(given)[:, 2].abs().max() < 1e-3
    assert (
        normalizer(torch.full((1, INPUTS), 1e6)).eq(10).all()
        and normalizer(torch.full((1, INPUTS), -1e6)).eq(-10).all()
    )


def test_normalizer_at_first_only_clips():
    obs = torch.linspace(-25, 25, INPUTS).view(1, INPUTS)
    assert torch.equal(Normalizer(INPUTS)(obs), obs.clamp(-10, 10))


# ---- Losses


def smooth_l1(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * x if abs(x.item()) < 1 else x.abs() - 0.5


@pytest.mark.parametrize("placement", ["utility", "additive", "gated"])
def test_loss_is_that_of_plain_loops(placement):
    """Value and gradients, row by row, dummies left out."""
    agent, batch, noise = made_up_batch()
    args = Args(reward_loss_coef=0.3, transition_loss_coef=0.02, loss_placement=placement, ent_coef=0.01)
    loss, _ = script.compute_loss(agent, batch, args, noise)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in agent.named_parameters()}
    agent.zero_grad()

    real = [row for row in range(len(batch.mask)) if batch.mask[row] == 1]
    advantages = [batch.advantages[row].item() for row in real]
    mean, std = statistics.fmean(advantages), statistics.pstdev(advantages)
    total, clipped_rows = torch.zeros(()), 0
    for row in real:
        obs, next_obs = batch.obs[row // 2, row % 2], batch.obs[row // 2, row % 2 + 1]
        z, next_z = agent.encode(obs[None]), agent.encode(next_obs[None])
        action = batch.actions[row][None]
        policy = Normal(agent.actor(z), agent.log_std.exp())
        ratio = (policy.log_prob(action).sum() - batch.old_log_probs[row]).exp()
        l_r = smooth_l1(agent.reward_model(z, action)[0] - batch.rewards[row])
        predicted = agent.transition_model(z, action, noise[row][None])[0]
        l_p = sum(smooth_l1(x) for x in predicted - next_z[0])
        penalty = 0.3 * l_r + 0.02 * l_p
        utility = (batch.advantages[row] - mean) / (std + 1e-8) - (0 if placement == "additive" else penalty)
        bound = ratio.clamp(0.8, 1.2)
        if (bound * utility).item() < (ratio * utility).item():
            clipped_rows += 1
            objective = bound.detach() * (utility.detach() if placement == "gated" else utility)
        else:
            objective = ratio * utility
        value = agent.critic(agent.normalizer(obs[None]))[0, 0]
        row_loss = -objective + 0.5 * 0.5 * (value - batch.returns[row]) ** 2 - 0.01 * policy.entropy().sum()
        total = total + row_loss + (penalty if placement == "additive" else 0)
    assert 0 < clipped_rows < len(real)
    total = total / len(real)
    total.backward()
    torch.testing.assert_close(loss, total)
    for name, parameter in agent.named_parameters():
        bound = 1e-5 * parameter.grad.abs().max().item()  # rows cancel: the error is that of the terms, not of the sum
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=bound, msg=name)
    assert gradients["encoder.0.weight"].abs().max() > 0 and gradients["reward_model.output.weight"].abs().max() > 0


def test_dummies_change_nothing():
    agent, batch, noise = made_up_batch()
    loss, _ = script.compute_loss(agent, batch, Args(), noise)
    spoilt = {"actions": 50.0, "rewards": 1e3, "old_log_probs": -3.0, "advantages": 1e4, "returns": -1e4}
    changed = {name: getattr(batch, name).clone() for name in spoilt}
    for name, value in spoilt.items():
        changed[name][batch.mask == 0] = value
    torch.testing.assert_close(script.compute_loss(agent, batch._replace(**changed), Args(), noise)[0], loss)


def test_world_model_sees_the_action_that_is_executed_and_is_lipschitz():
    agent, batch, noise = made_up_batch(B=50)
    z = script.latents(agent, batch)[0].detach()
    executed = batch.actions.clamp(*BOX)
    assert not torch.equal(executed, batch.actions)
    for model, extra in ((agent.reward_model, ()), (agent.transition_model, (noise,))):
        torch.testing.assert_close(model(z, batch.actions, *extra), model(z, executed, *extra))
        other = executed.roll(1, dims=0)
        assert not torch.equal(model(z, executed, *extra), model(z, other, *extra))
    moved_z = z + 0.1 * torch.randn_like(z)
    moved_a = (executed + 0.1 * torch.randn_like(executed)).clamp(*BOX)
    distance = torch.cat((moved_z - z, moved_a - executed), 1).norm(dim=1)
    change = (agent.reward_model(moved_z, moved_a) - agent.reward_model(z, executed)).abs()
    assert (change <= distance * 1.001).all() and (change > 0.01 * distance).any()


# ---- Games


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Pendulum-v1"])
def test_games(env_id, monkeypatch):
    """Actions clipped to the box in its own type; true last observations; dummies after them; returns and lengths."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    N, steps = 3, 1005 if env_id == "HalfCheetah-v4" else 205
    limit = {"HalfCheetah-v4": 1000, "Pendulum-v1": 200}.get(env_id)  # in the others the robot falls before
    games = Games(Args(env_id=env_id, num_envs=N, device="cpu"))
    box, sent, rewards = games.envs.action_space, [], []
    step = games.envs.step

    def recorded(actions):
        sent.append(actions.copy())
        made = step(actions)
        rewards.append(made[1].copy())
        return made

    monkeypatch.setattr(games.envs, "step", recorded)
    first = games.reset()
    assert first.shape == (N, games.num_inputs) and first.dtype == torch.float32
    assert torch.equal(games.box, torch.tensor(np.array([box.low, box.high])).float())
    rng, returns, lengths, dummy = torch.Generator().manual_seed(0), np.zeros(N), np.zeros(N), np.zeros(N, dtype=bool)
    told, seen = 0, set()
    for _ in range(steps):
        actions = 3 * torch.randn(N, games.box.shape[1], generator=rng)
        obs, reward, is_terminal, is_last, episodes = games.step(actions)
        assert sent[-1].dtype == box.dtype and (sent[-1] >= box.low).all() and (sent[-1] <= box.high).all()
        inside = (actions >= games.box[0]) & (actions <= games.box[1])
        np.testing.assert_array_equal(sent[-1][inside], actions.numpy()[inside])
        border = torch.where(actions < 0, *games.box).numpy().astype(box.dtype)
        np.testing.assert_array_equal(sent[-1][~inside], border[~inside])
        seen |= {bool(x) for x in inside.flatten()}
        assert obs.dtype == reward.dtype == torch.float32 and is_last.dtype == is_terminal.dtype == torch.bool
        np.testing.assert_array_equal(reward, rewards[-1])
        assert not reward[dummy].any() and not is_last[dummy].any()
        returns += rewards[-1]
        lengths += ~dummy
        assert set(episodes) == set(np.flatnonzero(is_last))
        for i, (episodic_return, length) in episodes.items():
            assert episodic_return == pytest.approx(returns[i]) and length == lengths[i]
            returns[i] = lengths[i] = 0
        told += len(episodes)
        if limit and episodes:  # last, and not terminal
            assert is_last.all() and not is_terminal.any() and {length for _, length in episodes.values()} == {limit}
        elif not limit:
            assert torch.equal(is_last, is_terminal)
        dummy = is_last.numpy().copy()
    assert seen == {True, False} and told >= N


def test_a_run_that_goes_on_plays_new_games():
    args = Args(env_id="Hopper-v4", num_envs=2, device="cpu")
    first, again, later = Games(args).reset(), Games(args).reset(), Games(args, 7).reset()
    assert torch.equal(first, again) and not torch.isclose(first, later).all(1).any()
    assert not torch.equal(first[0], first[1])


# ---- Bad input


@pytest.mark.parametrize(
    "module, env_id, words",
    [
        (script, "CartPole-v1", ["CartPole-v1", "must be continuous", "deep_spi_ppo.py"]),
        (script, "Pong-v5", ["Pong-v5", "must be continuous"]),
        (script, "CarRacing-v3", ["CarRacing-v3", "array of floats"]),
        (script, "HopperHop-v1", ["HopperHop-v1", "array of floats"]),
        (script, "Hoper-v4", ["Hoper-v4", "closest: Hopper-v4"]),
        (script, "VizdoomCustom-v1", ["VizdoomCustom-v1"]),
        (deep_spi_ppo, "Hopper-v4", ["Hopper-v4", "must be discrete"]),
        (deep_spi_ppo, "Pendulum-v1", ["Pendulum-v1", "must be discrete"]),
    ],
)
def test_wrong_environments_are_refused_in_one_line(module, env_id, words, monkeypatch, capsys):
    monkeypatch.setattr("envpool.make", lambda *_, **__: pytest.fail("an environment was built"))
    with pytest.raises(SystemExit) as refused:
        module.Args(env_id=env_id)
    captured = capsys.readouterr()
    assert refused.value.code == 2 and captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1 and captured.err.startswith("error: --env-id: got ")
    assert all(word in captured.err for word in words)


def test_wrong_settings_are_refused_in_one_line(capsys):
    for name, value in (("num_minibatches", 3), ("gamma", 1.01), ("clip_coef", 1.0), ("reward_loss_coef", -1.0)):
        with pytest.raises(SystemExit) as refused:
            Args(**{name: value})
        error = capsys.readouterr().err
        assert refused.value.code == 2 and len(error.strip().splitlines()) == 1
        assert error.startswith(f"error: --{name.replace('_', '-')}: got {value}")


# ---- Training


def weights(folder, name="run") -> dict[str, torch.Tensor]:
    return torch.load(folder / name / "agent.pt", weights_only=True)


def exit_code_of_training(args: Args) -> int:
    """Train until SystemExit. After it nothing holds the run, and with it the lock on its folder."""
    try:
        script.train(args)
    except SystemExit as stopped:
        code = stopped.code
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    gc.collect()
    return code


def test_minibatches_are_what_happened(monkeypatch, tmp_path):
    """Observations, drawn actions, scaled rewards, values, advantages, dummies; an iteration's first ratios are 1."""
    played, losses, gaes, policies, step, gae = [], [], [], [], Games.step, script.compute_gae
    compute_loss, share_outside = script.compute_loss, script.share_outside

    def recorded_step(games, actions):
        made = step(games, actions)
        played.append((actions.clone(), *(x.clone() for x in made[:4])))
        return made

    def recorded_loss(agent, batch, args, noise):
        if len(losses) % args.num_minibatches == 0:  # before an iteration's first step
            policies.append(copy.deepcopy(agent))
        loss, stats = compute_loss(agent, batch, args, noise)
        losses.append((batch, stats["spi/ratios"]))
        return loss, stats

    def recorded_gae(*inputs):
        made = gae(*inputs)
        gaes.append([x.clone() if isinstance(x, torch.Tensor) else x for x in (*inputs, *made)])
        return made

    def recorded_share(old, new, mask, clip_coef):
        shares.append([x.clone() for x in (*old, *new, mask)])
        return share_outside(old, new, mask, clip_coef)

    monkeypatch.setattr(Games, "step", recorded_step)
    monkeypatch.setattr(script, "compute_loss", recorded_loss)
    monkeypatch.setattr(script, "compute_gae", recorded_gae)
    monkeypatch.setattr(script, "share_outside", recorded_share)
    monkeypatch.setattr(script.RewardScaler, "scale", lambda self, rewards, is_last: 3 * rewards)
    T, N, iterations, shares = 64, 4, 4, []  # Pendulum's time limit is within
    args = small_args(tmp_path, total_timesteps=iterations * T * N, chunk_length=4)
    script.train(args)

    actions, obs, rewards, is_terminal, is_last = (torch.stack(column) for column in zip(*played, strict=True))
    first = Games(args).reset()
    obs = torch.cat((first[None], obs))
    dummy = torch.cat((torch.zeros(1, N, dtype=torch.bool), is_last[:-1]))
    assert is_last.any() and not is_terminal.any() and dummy.any()
    assert (actions.abs() > 2).any()  # as drawn, beyond Pendulum's box
    torch.manual_seed(args.seed)
    agent = Agent(3, torch.tensor([[-2.0], [2.0]]))
    with torch.no_grad():
        torch.testing.assert_close(actions[0], agent.policy(agent.encode(first))[0] + torch.randn(N, 1))
    for i, (gae_rewards, values, gae_terminal, gae_last, *_) in enumerate(gaes):
        rows = slice(i * T, (i + 1) * T)
        assert torch.equal(gae_rewards, 3 * rewards[rows]) and not gae_terminal.any()
        assert torch.equal(gae_last[1:], is_last[rows]) and torch.equal(gae_last[:-1], dummy[rows])
        with torch.no_grad():
            torch.testing.assert_close(values, policies[i].value(obs[i * T : (i + 1) * T + 1]))
            (old_mean, old_std), kept = policies[i].policy(policies[i].encode(obs[rows])), shares[i]
        torch.testing.assert_close(kept[0], old_mean)
        assert torch.equal(kept[1], old_std) and torch.equal(kept[4], (~dummy[rows]).float())
        assert not torch.equal(kept[2], kept[0]) and not torch.equal(kept[3], kept[1])  # the new policy has moved
        if i + 1 < iterations:
            assert torch.equal(kept[3], policies[i + 1].log_std)
    step_of = {obs[t, n].numpy().tobytes(): (t, n) for t in range(T * iterations) for n in range(N)}
    seen = set()
    for k, (batch, ratios) in enumerate(losses):
        if k % args.num_minibatches == 0:  # the policy is the one that played
            torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=1e-4, atol=1e-4)
        for row in range(len(batch.mask)):
            b, l = divmod(row, 4)  # noqa: E741
            t, n = step_of[batch.obs[b, l].numpy().tobytes()]
            seen.add((t, n))
            assert t // T == k // args.num_minibatches
            assert torch.equal(batch.obs[b, l + 1], obs[t + 1, n]) and torch.equal(batch.actions[row], actions[t, n])
            assert batch.rewards[row] == 3 * rewards[t, n] and batch.mask[row] == (not dummy[t, n])
            advantages, returns = gaes[t // T][-2:]
            assert batch.advantages[row] == advantages[t % T, n] and batch.returns[row] == returns[t % T, n]
    assert len(seen) == T * N * iterations
    steps = read_events(tmp_path / "run")["charts/learning_rate"][1]
    np.testing.assert_allclose(steps, args.learning_rate * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-6)

    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    rows = obs[:-1][~dummy].double()
    torch.testing.assert_close(state["normalizer.mean"], rows.mean(0).float())
    torch.testing.assert_close(state["normalizer.std"], rows.std(0, correction=0).float())


def test_zero_coefficients_are_ppo_to_the_last_bit(monkeypatch, tmp_path):
    """Beside a script without a world model, none of whose functions is called, nor its parameters there."""
    zero = {"reward_loss_coef": 0.0, "transition_loss_coef": 0.0, "env_id": "Hopper-v4"}
    script.train(small_args(tmp_path, **zero))

    class Nothing(torch.nn.Module):
        def __init__(self, *_):
            super().__init__()

        def forward(self, *_):
            pytest.fail("the world model was run")

    monkeypatch.setattr(script, "RewardModel", Nothing)
    monkeypatch.setattr(script, "TransitionModel", Nothing)
    for name in ("reward_loss", "transition_loss", "what_the_model_knows"):
        monkeypatch.setattr(script, name, Nothing())
    script.train(small_args(tmp_path, run_dir=str(tmp_path / "ppo"), **zero))
    ours, plain = weights(tmp_path), weights(tmp_path, "ppo")
    assert {name.split(".")[0] for name in ours.keys() - plain.keys()} == {"reward_model", "transition_model"}
    assert plain and all(torch.equal(ours[name], plain[name]) for name in plain)
    texts = [(tmp_path / name / "episodes.csv").read_text() for name in ("run", "ppo")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) > 10


@pytest.mark.parametrize(
    "changes", [{"loss_placement": "additive"}, {"loss_placement": "gated"}, {"precision": "bf16"}]
)
def test_each_placement_and_precision_trains(changes, tmp_path):
    settings = {"total_timesteps": 2 * 256, "update_epochs": 4, "learning_rate": 3e-3}  # so that rows are clipped
    script.train(small_args(tmp_path, **settings, **changes))
    script.train(small_args(tmp_path, **settings, run_dir=str(tmp_path / "other")))
    ours, other = weights(tmp_path), weights(tmp_path, "other")
    assert all(tensor.isfinite().all() for tensor in ours.values())
    assert not torch.equal(ours["actor.weight"], other["actor.weight"])


@pytest.mark.parametrize(
    "spoilt, value",
    [("actor.bias", torch.inf), ("critic.4.bias", torch.nan), ("log_std", 100.0), ("log_std", -200.0)],
)
def test_weights_of_no_policy_stop_the_run_before_they_are_written(spoilt, value, monkeypatch, tmp_path):
    """Spoilt by the second iteration's last step, which no loss saw. As deviations e^100 overflows, e^-200 is 0."""
    args, steps, adam_step = small_args(tmp_path, checkpoint_interval=1), [], torch.optim.Adam.step
    find = lambda optimizer: optimizer.param_groups[0]["params"][names.index(spoilt)]  # noqa: E731
    names = [name for name, _ in Agent(3, BOX).named_parameters()]

    def spoiling_step(optimizer):
        adam_step(optimizer)
        steps.append(None)
        if len(steps) == 4:
            with torch.no_grad():
                find(optimizer).fill_(value)

    monkeypatch.setattr(torch.optim.Adam, "step", spoiling_step)
    with pytest.raises(FloatingPointError, match="not finite"):
        script.train(args)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["iterations"] == 1 and all(tensor.isfinite().all() for tensor in state["agent"].values())


def test_resumed_run_equals_the_uninterrupted_one(monkeypatch, tmp_path):
    """To the last bit, if that one also starts new games at the checkpoint: what a resume cannot keep."""
    gae, calls = script.compute_gae, []

    def interrupting(*inputs):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return gae(*inputs)

    args = small_args(tmp_path, env_id="Hopper-v4")
    with monkeypatch.context() as patch:
        patch.setattr(script, "compute_gae", interrupting)
        assert exit_code_of_training(args) == 75
    assert not (tmp_path / "run" / "agent.pt").exists()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["iterations"] == 3
    script.train(args)

    end_iteration = script.Run.end_iteration

    def end_and_start_anew(run, *inputs):
        end_iteration(run, *inputs)
        if run.iterations == 3:
            own = sys._getframe(1).f_locals  # of train
            own["games"].__init__(own["args"], 3)
            own["obs"][-1] = own["games"].reset()
            own["is_last"][-1] = False
            own["reward_scaler"].discounted.zero_()

    monkeypatch.setattr(script.Run, "end_iteration", end_and_start_anew)
    script.train(replace(args, run_dir=str(tmp_path / "whole")))
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("run", "whole")]
    for key in ("agent", "reward_scaler"):
        assert all(torch.equal(states[0][key][name], states[1][key][name]) for name in states[0][key])
    assert torch.equal(states[0]["rng"], states[1]["rng"])
    assert states[0]["agent"]["normalizer.sums"][0, 0] > 4 * 256  # it counted on from where it was
    texts = [(tmp_path / name / "episodes.csv").read_text() for name in ("run", "whole")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) > 10


# ---- The script


def definitions(path: Path) -> dict[str, str]:
    source = path.read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


def test_differs_from_its_sibling_in_what_actions_touch():
    ours, sibling = (definitions(ROOT / name) for name in ("deep_spi_ppo_continuous.py", "deep_spi_ppo.py"))
    differing = {name for name in ours.keys() & sibling.keys() if ours[name] != sibling[name]}
    assert differing == {
        *("Args", "what_is_wrong", "Games", "RewardModel", "TransitionModel", "Agent", "Transitions"),
        "compute_loss",
        "train",
    }
    for line in ("has_wandb", "not self.track", "except ("):  # what a later repair of either must not miss
        own, theirs = ([x for x in text.values() if line in x] for text in (ours, sibling))
        found = [[x.strip() for x in "\n".join(texts).splitlines() if line in x] for texts in (own, theirs)]
        assert found[0] == found[1] and found[0], line
    assert ours.keys() - sibling.keys() == {"Normalizer", "log_density", "share_outside"}
    assert sibling.keys() <= ours.keys()
    texts = [(ROOT / name).read_text() for name in ("deep_spi_ppo_continuous.py", "deep_spi_ppo.py")]
    banners = [re.findall(r"^# ==== .*$", text, re.MULTILINE) for text in texts]
    assert banners[0] == banners[1] and len(banners[0]) == 6
    folders = [text.split(banners[0][-1])[1] for text in texts]
    assert folders[0] == folders[1]


def test_evaluate_plays_with_normal_policies(tmp_path):
    """Greedy and sampled, from the run's own copy of the script; Pendulum's episodes have 200 steps."""
    args = script.Args(
        env_id="Pendulum-v1", num_envs=2, num_steps=8, total_timesteps=32, num_minibatches=2, update_epochs=1,
        device="cpu", run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    script.train(args)
    own = evaluate.Args(tmp_path / "run", episodes=2)
    evaluate.main(own)
    rows = (tmp_path / "run" / "evaluation.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["greedy"] * 2 + ["sampled"] * 2
    assert all(row.endswith(",200,1") for row in rows)

    # The greedy games once more, by hand: the mean's action, and observations normalised as the run left them.
    games = Games(evaluate.settings_of(script, evaluate.load_config(tmp_path / "run"), own.seed, 2))
    agent = Agent(games.num_inputs, games.box)
    agent.load_state_dict(weights(tmp_path))
    assert (agent.normalizer.mean != 0).all()
    obs, returns = games.reset(), torch.zeros(2, dtype=torch.float64)
    for _ in range(200):
        with torch.no_grad():
            x = ((obs - agent.normalizer.mean) / agent.normalizer.std).clamp(-10, 10)
            obs, rewards, *_ = games.step(agent.actor(agent.encoder(x)))
        returns += rewards
    played = sorted(float(row.split(",")[1]) for row in rows[:2])
    np.testing.assert_allclose(played, sorted(returns.tolist()), rtol=1e-4)
