"""DreamSPI: what ships, against plain computations; who trains whom; what is imagined, and what is logged of it."""

import gc
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dream_spi
import dream_spi_atari
from benchmark.common import read_events
from tests.conftest import STOP_SIGNALS
from tests.launch import launch_all

SCRIPTS = (dream_spi_atari, dream_spi)
ids = lambda script: script.__name__  # noqa: E731
PARTS = ("encoder", "world_model", "actor", "critic")


@pytest.fixture(autouse=True)
def one_thread():
    """On which the bits depend."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(script, seed: int = 0):
    """An agent of 3 actions (4 inputs), its arguments, and V and C."""
    torch.manual_seed(seed)
    agent = script.Agent(4, 3) if script is dream_spi else script.Agent(3)
    return agent, script.Args(), (script.NUM_VARIABLES, script.NUM_CLASSES)


def observations(script, *shape: int) -> torch.Tensor:
    if script is dream_spi:
        return torch.randn(*shape, 4)
    return torch.randint(0, 256, (*shape, 84, 84, 4), dtype=torch.uint8)


def real_batch(script, agent, chunks: int = 3, length: int = 2):
    """Random transitions, some of them dummies."""
    rows = chunks * length
    return script.Transitions(
        obs=observations(script, chunks, length + 1),
        actions=torch.randint(0, 3, (rows,)),
        rewards=torch.randn(rows),
        old_log_probs=torch.randn(rows, 3).log_softmax(-1),
        advantages=torch.randn(rows),
        returns=torch.randn(rows),
        next_is_terminal=(torch.rand(rows) < 0.5).float(),
        mask=torch.tensor([1.0, 0.0] + [1.0] * (rows - 2)),
    )


def dream(script, agent, args, starts: int = 5, horizon: int = 6, done_shift: float = 0.0):
    """What is imagined from random starts, the second of which is masked; and the noise of it."""
    shape = script.NUM_VARIABLES, script.NUM_CLASSES
    noise = script.gumbel(horizon, starts, 3), script.gumbel(horizon, starts, *shape)
    noise = *noise, torch.rand(horizon, starts).logit() + done_shift
    mask = torch.ones(starts)
    mask[1] = 0
    with torch.no_grad():
        z = agent.encode(observations(script, starts))
        return script.imagine(agent, z, mask, *noise, args), z, noise


def snapshot(agent) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


def moved(agent, before) -> set[str]:
    """Names of the parts that have moved."""
    found = set()
    by_id = {id(parameter): name for name, part in agent.parts().items() for parameter in part}
    for name, parameter in agent.named_parameters():
        if not torch.equal(parameter, before[name]):
            found.add(by_id[id(parameter)])
    return found


# ---- Who trains whom


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_parts_are_all_parameters_once(script):
    agent, _, _ = make(script)
    parts = agent.parts()
    assert tuple(parts) == PARTS
    listed = [id(parameter) for part in parts.values() for parameter in part]
    assert len(listed) == len(set(listed)) and set(listed) == {id(parameter) for parameter in agent.parameters()}


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_real_data_trains_encoder_and_world_model_alone(script):
    agent, args, shape = make(script)
    optimizer = script.make_optimizer(agent, args)
    batch, before = real_batch(script, agent), snapshot(agent)
    loss, _ = script.model_loss(agent, batch, script.gumbel(6, *shape), args)
    norms = script.optimizer_step(optimizer, loss, ("encoder", "world_model"), args.max_grad_norm)
    assert moved(agent, before) == {"encoder", "world_model"}
    assert set(norms) == {"losses/grad_norm_encoder", "losses/grad_norm_world_model"}
    assert all(parameter.grad is None for name in ("actor", "critic") for parameter in agent.parts()[name])
    # The value loss is a logged number: no weight of it, no gradient.
    gradients = []
    for vf_coef in (0.5, 5.0):
        loss, _ = script.model_loss(agent, batch, torch.zeros(6, *shape), replace(args, vf_coef=vf_coef))
        agent.zero_grad()
        loss.backward(inputs=agent.parts()["encoder"])
        gradients.append([parameter.grad.clone() for parameter in agent.parts()["encoder"]])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_imagination_trains_actor_and_critic_alone(script):
    agent, args, _ = make(script)
    optimizer, before = script.make_optimizer(agent, args), snapshot(agent)
    imagined, _, _ = dream(script, agent, args)
    assert not any(x.requires_grad for x in imagined)
    batch = script.Transitions(*(x.flatten(0, 1) for x in imagined))
    loss, _ = script.compute_loss(agent, batch, batch.obs, 0.0, args.imagination_clip_coef, args)
    script.optimizer_step(optimizer, loss, ("actor", "critic"), args.max_grad_norm)
    assert moved(agent, before) == {"actor", "critic"}
    assert all(parameter.grad is None for name in ("encoder", "world_model") for parameter in agent.parts()[name])


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_training_gives_each_part_its_own_data(script, monkeypatch, tmp_path):
    """In `train`: every step moves two parts; the world model's steps come first, the actor's see no frame."""
    calls, step = [], script.optimizer_step

    def recorded(optimizer, loss, names, max_grad_norm):
        groups = {group["name"]: group["params"] for group in optimizer.param_groups}
        before = {name: [parameter.detach().clone() for parameter in part] for name, part in groups.items()}
        norms = step(optimizer, loss, names, max_grad_norm)
        changed = {
            name
            for name, part in groups.items()
            if any(not torch.equal(*pair) for pair in zip(part, before[name], strict=True))
        }
        calls.append((names, changed, {group["name"]: group["lr"] for group in optimizer.param_groups}))
        return norms

    monkeypatch.setattr(script, "optimizer_step", recorded)
    args = small_args(script, tmp_path / "run", iterations=2)
    script.train(args)
    a_model, a_behaviour = ("encoder", "world_model"), ("actor", "critic")
    real = args.update_epochs * args.num_minibatches
    dreamt = args.imagination_epochs * args.num_minibatches * args.horizon
    assert [names for names, _, _ in calls] == 2 * ([a_model] * real + [a_behaviour] * dreamt)
    assert all(changed == set(names) for names, changed, _ in calls)
    for i, (_, _, rates) in enumerate(calls):  # annealed per iteration, each part from its own rate
        share = 1 - (i // (real + dreamt)) / 2
        assert rates == pytest.approx(
            dict.fromkeys(a_model, share * args.learning_rate)
            | dict.fromkeys(a_behaviour, share * args.behaviour_learning_rate)
        )


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_each_part_has_a_norm_of_its_own(script):
    agent, args, shape = make(script)
    optimizer = script.make_optimizer(agent, args)
    loss, _ = script.model_loss(agent, real_batch(script, agent), script.gumbel(6, *shape), args)
    norms = script.optimizer_step(optimizer, loss, ("encoder", "world_model"), 1e-6)
    for name in ("encoder", "world_model"):
        after = math.sqrt(sum(p.grad.double().square().sum().item() for p in agent.parts()[name]))
        assert norms[f"losses/grad_norm_{name}"] > 1e-6 and after == pytest.approx(1e-6, rel=1e-4)
    loss, _ = script.model_loss(agent, real_batch(script, agent), script.gumbel(6, *shape), args)
    script.optimizer_step(optimizer, 0 * loss, ("encoder", "world_model"), 1e-6)  # a gradient of 0 stays one
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


# ---- Latents


def test_one_hot_sample_is_exact_and_straight_through():
    torch.manual_seed(0)
    logits = torch.randn(50, 7, 9, requires_grad=True)
    z = dream_spi_atari.one_hot_sample(logits)
    assert torch.equal(z, torch.nn.functional.one_hot(logits.argmax(-1), 9).float())
    weights = torch.randn_like(logits)
    (z * weights).sum().backward()
    straight = logits.grad.clone()
    logits.grad = None
    (logits.softmax(-1) * weights).sum().backward()
    torch.testing.assert_close(straight, logits.grad)


def test_latents_are_one_hot_in_bf16_too():
    agent, _, shape = make(dream_spi_atari)
    with torch.autocast("cpu", torch.bfloat16):
        z = agent.encode(observations(dream_spi_atari, 3))
        following = agent.transition_model(z, torch.tensor([0, 1, 2]), dream_spi_atari.gumbel(3, *shape))
    for latent in (z, following):
        assert latent.dtype == torch.float32 and latent.sum(-1).eq(1).all() and latent.max(-1).values.eq(1).all()


def test_gumbel_noise_draws_from_the_probabilities():
    torch.manual_seed(0)
    p = torch.tensor([0.1, 0.6, 0.3])
    z = dream_spi_atari.one_hot_sample(p.log().expand(200_000, 1, 3), dream_spi_atari.gumbel(200_000, 1, 3))
    torch.testing.assert_close(z.mean((0, 1)), p, atol=0.005, rtol=0)


def test_transition_loss_counts_wrong_variables():
    one_hot = lambda index: torch.nn.functional.one_hot(torch.tensor(index), 5).float()  # noqa: E731
    z, other = one_hot([[0, 1, 2, 3], [4, 4, 4, 4]]), one_hot([[0, 1, 2, 4], [0, 1, 2, 3]])
    assert dream_spi_atari.transition_loss(z, other).tolist() == [0.25, 1.0]


# ---- Imagination


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_imagination_against_a_plain_loop(script):
    """Latents, restarts, advantages and returns, chain by chain, step by step."""
    agent, args, _ = make(script)
    args = replace(args, gamma=0.9, gae_lambda=0.8)
    imagined, z, (action_noise, latent_noise, done_noise) = dream(script, agent, args, done_shift=0.5)
    H, B = imagined.rewards.shape
    ends = imagined.next_is_terminal > 0
    assert ends.any() and not ends.all()
    with torch.no_grad():
        for b in range(B):
            latent, values, rewards = z[b : b + 1], [], []
            for h in range(H):
                torch.testing.assert_close(imagined.obs[h, b], latent[0])
                log_probs, value = agent.policy_and_value(latent)
                action = (log_probs + action_noise[h, b]).argmax(-1)
                assert action == imagined.actions[h, b]
                torch.testing.assert_close(imagined.old_log_probs[h, b], log_probs[0])
                following = agent.transition_model(latent, action, latent_noise[h, b : b + 1])
                is_end = agent.done_model(following) + done_noise[h, b] > 0
                assert is_end == ends[h, b]
                values.append(value.item())
                rewards.append(agent.reward_model(latent, action).item())
                latent = latent if is_end else following  # a restart, from where the last step was made
            values.append(agent.policy_and_value(latent)[1].item())
            torch.testing.assert_close(imagined.rewards[:, b], torch.tensor(rewards), rtol=1e-4, atol=1e-5)
            for h in range(H):  # the sum of eq. 16, written out
                advantage, weight = 0.0, 1.0
                for k in range(h, H):
                    alive = 0.0 if ends[k, b] else 1.0
                    advantage += weight * (rewards[k] + args.gamma * alive * values[k + 1] - values[k])
                    weight *= args.gamma * args.gae_lambda * alive
                assert imagined.advantages[h, b].item() == pytest.approx(advantage, rel=1e-3, abs=1e-4)
                assert imagined.returns[h, b].item() == pytest.approx(advantage + values[h], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("odds", [-4.0, -2.0, 0.0, 2.0])
def test_dones_are_drawn_at_their_rate(odds, monkeypatch):
    """The published code loses a quarter of them."""
    script = dream_spi
    agent, args, shape = make(script)
    monkeypatch.setattr(agent, "done_model", lambda z: torch.full((len(z),), odds))
    B = 40_000
    z = torch.zeros(B, *shape)
    z[..., 0] = 1
    noise = script.gumbel(1, B, 3), script.gumbel(1, B, *shape), torch.rand(1, B).logit()
    with torch.no_grad():
        rate = script.imagine(agent, z, torch.ones(B), *noise, args).next_is_terminal.mean().item()
    p = 1 / (1 + math.exp(-odds))
    assert abs(rate - p) < 4 * math.sqrt(p * (1 - p) / B)


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_what_is_imagined_from_a_masked_start_counts_nowhere(script):
    agent, args, _ = make(script)
    imagined, _, _ = dream(script, agent, args)
    assert (imagined.mask[:, 1] == 0).all() and imagined.mask.sum() == imagined.mask.numel() - len(imagined.mask)
    losses = []
    for scale in (0.0, 1e3):  # other numbers in the masked chain
        changed = imagined._replace(
            advantages=imagined.advantages.clone(), returns=imagined.returns.clone(), obs=imagined.obs.clone()
        )
        changed.advantages[:, 1] += scale
        changed.returns[:, 1] -= scale
        changed.obs[:, 1] = changed.obs[:, 1].roll(1, -1) if scale else changed.obs[:, 1]
        batch = script.Transitions(*(x.flatten(0, 1) for x in changed))
        loss, stats = script.compute_loss(agent, batch, batch.obs, 0.0, 0.1, args)
        agent.zero_grad()
        loss.backward(inputs=[p for name in ("actor", "critic") for p in agent.parts()[name]])
        losses.append((loss.item(), [p.grad.clone() for p in agent.actor.parameters()], stats))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    for first, second in zip(losses[0][1], losses[1][1], strict=True):
        torch.testing.assert_close(first, second)
    for name, value in losses[0][2].items():
        torch.testing.assert_close(value, losses[1][2][name])


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
@pytest.mark.parametrize("rows", [0, 4])
def test_minibatches_without_a_real_row(script, rows):
    """No row, or dummies alone: every loss and every gradient is 0, nothing is NaN."""
    agent, args, shape = make(script)
    batch = real_batch(script, agent, chunks=2, length=2)
    batch = script.Transitions(*(x[: rows // 2] if x is batch.obs else x[:rows] for x in batch))
    batch = batch._replace(mask=torch.zeros(rows))
    loss, stats = script.model_loss(agent, batch, script.gumbel(rows, *shape), args)
    assert loss == 0 and all(value.isfinite().all() for value in stats.values())
    script.optimizer_step(script.make_optimizer(agent, args), loss, ("encoder", "world_model"), 0.5)
    latents = torch.zeros(rows, *shape)
    loss, stats = script.compute_loss(agent, batch, latents, 0.0, 0.1, args)
    assert loss == 0 and all(value.isfinite().all() for value in stats.values())
    script.optimizer_step(script.make_optimizer(agent, args), loss, ("actor", "critic"), 0.5)
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


# ---- What is logged


def test_planning_stats():
    script = dream_spi
    agent, args, _ = make(script)
    T, N = 4, 5
    imagined, _, _ = dream(script, agent, args, starts=T * N, horizon=3)
    imagined = imagined._replace(next_is_terminal=torch.zeros(3, T * N))
    imagined.next_is_terminal[1, 2] = imagined.next_is_terminal[1, 1] = 1.0  # the second chain is masked
    real_returns, ends, mask = torch.randn(T * N), torch.zeros(T, N), torch.ones(T, N)
    ends[2, 3], mask[3, 3] = 1.0, 0.0
    inputs = agent, imagined, real_returns, ends, mask, 0.9
    with torch.no_grad():
        stats = script.planning_stats(*inputs)
    assert stats["spi/planning_ratio_max"].item() == pytest.approx(1, abs=1e-5)
    assert stats["spi/planning_inside"] == 1
    assert stats["imagination/done_rate"].item() == pytest.approx(1 / (3 * (T * N - 1)))
    assert stats["imagination/real_done_rate"].item() == pytest.approx(1 / (T * N - 1))
    rows = [b for b in range(T * N) if b != 1]
    dreamt, happened = imagined.returns[0][rows].numpy(), real_returns[rows].numpy()
    assert stats["imagination/return"].item() == pytest.approx(dreamt.mean(), rel=1e-4)
    assert stats["imagination/real_return"].item() == pytest.approx(happened.mean(), rel=1e-4)
    assert stats["imagination/return_error"].item() == pytest.approx(np.abs(dreamt - happened).mean(), rel=1e-4)

    with torch.no_grad():  # an actor that moved: its ratios, counted by hand
        agent.actor[2].bias += torch.tensor([0.15, 0.0, 0.0])
        agent.actor[2].weight += 0.1 * torch.randn_like(agent.actor[2].weight)
        stats = script.planning_stats(*inputs)
        flat = script.Transitions(*(x.flatten(0, 1) for x in imagined))
        ratios = (agent.policy_and_value(flat.obs)[0] - flat.old_log_probs).exp()[flat.mask > 0]
    assert stats["spi/planning_ratio_max"].item() == pytest.approx(ratios.max().item())
    assert stats["spi/planning_ratio_mean"].item() == pytest.approx(ratios.max(1).values.mean().item())
    inside = ((ratios <= 1 / 0.9) & (ratios >= 2 - 1 / 0.9)).all(1).float().mean().item()
    assert 0 < inside < 1 and stats["spi/planning_inside"].item() == pytest.approx(inside)


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_weights_that_no_loss_has_seen_are_looked_at(part):
    """The last step of an iteration may be the one that goes too far."""
    agent, args, _ = make(dream_spi)
    imagined, _, _ = dream(dream_spi, agent, args)
    with torch.no_grad():
        agent.parts()[part][0][0] = math.inf
        with pytest.raises(FloatingPointError, match="not finite"):
            dream_spi.planning_stats(agent, imagined, torch.zeros(5), torch.zeros(2, 2), torch.ones(2, 2), 0.9)


def test_latent_stats(monkeypatch):
    script = dream_spi
    agent, _, (V, C) = make(script)
    z = torch.zeros(3, 2, V, C)
    z[..., 0] = 1
    z[0, 0] = z[0, 0].roll(1, -1)  # one of the four rows that count takes class 1 everywhere
    is_last = torch.tensor([[False, False], [True, False], [True, False]])
    flat = z.flatten(0, 1)
    stats = script.latent_stats(agent, flat, torch.zeros(3, 2, dtype=torch.bool), is_last)
    assert set(stats) == {"world_model/dead_classes", "world_model/latent_entropy"}  # no terminal state, no accuracy
    assert stats["world_model/dead_classes"].item() == pytest.approx((C - 2) / C)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert stats["world_model/latent_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    monkeypatch.setattr(agent, "done_model", lambda z: torch.linspace(-1, 2, len(z)))
    is_terminal = torch.tensor([[True, True], [True, True], [False, False]])
    stats = script.latent_stats(agent, flat, is_terminal, is_last)
    assert stats["world_model/done_accuracy_last"] == 0.5  # -1, 0 no; 1, 2 yes


# ---- Whole runs


def small_args(script, folder: Path, iterations: int = 4, **settings):
    """Small settings."""
    sizes = {"num_envs": 4, "num_steps": 8, "env_id": "Boxing-v5", "horizon": 3}
    if script is dream_spi:
        sizes = {"num_envs": 4, "num_steps": 16, "horizon": 3}
    sizes |= {"device": "cpu", "precision": "fp32", "num_minibatches": 2, "update_epochs": 1, "seed": 3} | settings
    steps = iterations * sizes["num_envs"] * sizes["num_steps"]
    return script.Args(run_dir=str(folder), **({"total_timesteps": steps} | sizes))


def train(script, args) -> int:
    """Train as a process of its own would: its exit code, and afterwards nothing holds the run's folder."""
    code = 0
    try:
        script.train(args)
    except SystemExit as ended:
        code = ended.code
    for number in (*STOP_SIGNALS, signal.SIGHUP):  # their handler is a method of the run
        signal.signal(number, signal.SIG_DFL)
    gc.collect()
    return code


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "agent.pt", weights_only=True)


def test_dummies_and_ends_reach_the_losses_as_they_were(monkeypatch, tmp_path):
    """CartPole's ends are terminal: labels of the done model, and starts that do not count follow them."""
    script, batches, dreams = dream_spi, [], []
    model_loss, imagine = script.model_loss, script.imagine

    def recorded_loss(agent, batch, noise, args):
        batches.append(batch)
        return model_loss(agent, batch, noise, args)

    def recorded_imagine(agent, z, mask, *inputs):
        dreams.append((z, mask))
        return imagine(agent, z, mask, *inputs)

    monkeypatch.setattr(script, "model_loss", recorded_loss)
    monkeypatch.setattr(script, "imagine", recorded_imagine)
    script.train(small_args(script, tmp_path / "cartpole", iterations=6, num_envs=8, num_steps=32))
    dummies = terminals = 0
    for batch in batches:
        mask, ends = batch.mask.view(batch.obs.shape[0], -1), batch.next_is_terminal.view(batch.obs.shape[0], -1)
        assert (ends[:, :-1] <= 1 - mask[:, 1:]).all()  # after a terminal s' comes a dummy
        is_over = (batch.obs[:, 1:, 0].abs() > 2.4) | (batch.obs[:, 1:, 2].abs() > 12 * 2 * math.pi / 360)
        assert torch.equal(is_over & (mask > 0), ends > 0)
        dummies, terminals = dummies + (mask == 0).sum().item(), terminals + ends.sum().item()
    assert dummies > 10 and terminals > 10
    assert sum((mask == 0).sum().item() for _, mask in dreams) == dummies  # one epoch: each row once in both

    batches.clear()
    script.train(
        small_args(script, tmp_path / "car", env_id="MountainCar-v0", num_steps=64, chunk_length=8, num_minibatches=4)
    )
    assert sum((batch.mask == 0).sum().item() for batch in batches) == 4  # the time limit, after 200 steps
    assert not any(batch.next_is_terminal.any() for batch in batches)  # is no terminal state


def test_one_environment_and_one_step(tmp_path):
    """Rollouts of one row, some of them a dummy alone: those teach nothing, and the run goes on."""
    args = small_args(
        dream_spi, tmp_path / "run", iterations=60, num_envs=1, num_steps=1, chunk_length=1, num_minibatches=1,
        horizon=2, total_timesteps=60,
    )  # fmt: skip
    dream_spi.train(args)
    assert len((tmp_path / "run" / "episodes.csv").read_text().splitlines()) > 1
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.parametrize("starts", [4, 20])
def test_fewer_starts(starts, monkeypatch, tmp_path):
    sizes, imagine = [], dream_spi.imagine

    def recorded(agent, z, mask, action_noise, *inputs):
        sizes.append((len(z), len(mask), tuple(action_noise.shape)))
        return imagine(agent, z, mask, action_noise, *inputs)

    monkeypatch.setattr(dream_spi, "imagine", recorded)
    dream_spi.train(small_args(dream_spi, tmp_path / "run", imagination_starts=starts))
    assert sizes == [(starts, starts, (3, starts, 2))] * 4


def replay_from(script, stop_at: int, monkeypatch) -> None:
    """Make an uninterrupted run start new games after so many iterations: what going on cannot keep."""
    end_iteration = script.Run.end_iteration

    def end_and_start_anew(self, *inputs):
        end_iteration(self, *inputs)
        if self.iterations == stop_at:
            own = sys._getframe(1).f_locals  # of train
            own["games"].__dict__ |= vars(script.Games(self.args, stop_at))
            own["obs"][-1] = own["games"].reset()
            own["is_last"][-1] = False
            if script is dream_spi:
                own["reward_scaler"].discounted.zero_()

    monkeypatch.setattr(script.Run, "end_iteration", end_and_start_anew)


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_interrupted_run_equals_the_uninterrupted_one(script, monkeypatch, tmp_path):
    """To the last bit: weights, episodes. The run is stopped by a signal, in its third iteration."""
    settings = {"iterations": 6, "num_steps": 32} if script is dream_spi else {"iterations": 6}
    args = small_args(script, tmp_path / "interrupted", **settings)
    calls, imagine = [], script.imagine

    def imagine_and_stop(*inputs):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return imagine(*inputs)

    monkeypatch.setattr(script, "imagine", imagine_and_stop)
    assert train(script, args) == 75 and not (tmp_path / "interrupted" / "agent.pt").exists()
    assert train(script, replace(args)) == 0
    with monkeypatch.context() as patch:
        replay_from(script, 3, patch)
        script.train(small_args(script, tmp_path / "whole", **settings))
    ours, theirs = weights(tmp_path / "interrupted"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    texts = [(tmp_path / name / "episodes.csv").read_text() for name in ("interrupted", "whole")]
    assert texts[0] == texts[1]
    if script is dream_spi:
        assert len(texts[0].splitlines()) > 10


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_the_same_seed_gives_the_same_run_to_the_bit(script, tmp_path):
    for name in ("one", "two"):
        script.train(small_args(script, tmp_path / name, iterations=2))
    script.train(small_args(script, tmp_path / "other", iterations=2, seed=4))
    one, two, other = (weights(tmp_path / name) for name in ("one", "two", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_a_run_goes_on_with_the_same_settings_only(script, tmp_path, capsys):
    args = small_args(script, tmp_path / "run", iterations=2)
    assert train(script, args) == 0
    capsys.readouterr()
    assert train(script, replace(args)) == 0
    assert "complete" in capsys.readouterr().out
    longer = replace(args, total_timesteps=2 * args.total_timesteps)
    assert train(script, replace(longer, imagination_clip_coef=0.01)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--run-dir" in error and "imagination-clip-coef" in error
    assert train(script, longer) == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_a_run_that_diverges_says_so(script, monkeypatch, tmp_path):
    model_loss = script.model_loss

    def diverging(*inputs):
        loss, stats = model_loss(*inputs)
        return loss * math.nan, stats

    monkeypatch.setattr(script, "model_loss", diverging)
    with pytest.raises(FloatingPointError, match="not finite"):
        script.train(small_args(script, tmp_path / "run"))
    assert not (tmp_path / "run" / "agent.pt").exists()


BAD = {  # field, value, what the one line must contain beside the flag
    "no horizon": ("horizon", 0, "at least 1"),
    "negative starts": ("imagination_starts", -1, "at least 0"),
    "more starts than rows": ("imagination_starts", 102_400, "at most"),
    "starts not whole minibatches": ("imagination_starts", 17, "a multiple of"),
    "no epochs": ("imagination_epochs", 0, "at least 1"),
    "no neighbourhood": ("imagination_clip_coef", 1.0, "1 < C < 2"),
    "no clip": ("clip_coef", 0.0, "1 < C < 2"),
    "no discount": ("gamma", 0.0, "positive"),
    "discount over 1": ("gamma", 1.1, "[0, 1]"),
    "no step size": ("behaviour_learning_rate", 0.0, "positive"),
    "coefficient not a number": ("transition_loss_coef", math.nan, "finite"),
    "unknown environment": ("env_id", "Pongg-v9", "Pong"),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(script, case, capsys):
    name, value, rule = BAD[case]
    with pytest.raises(SystemExit) as refused:
        script.Args(**{name: value})
    assert refused.value.code == 2
    out, error = capsys.readouterr()
    assert not out and len(error.strip().splitlines()) == 1
    assert f"--{name.replace('_', '-')}: got {value!r}" in error and rule in error, error


@pytest.mark.slow
def test_acrobot_is_solved_in_imagination(tmp_path):
    """By an actor that never saw a gradient of real data, as the README says, and not by one lucky seed."""
    flags = ["--env-id", "Acrobot-v1", "--horizon", "15"]
    runs = {seed: tmp_path / seed for seed in ("1", "2")}
    done = launch_all({s: ("dream_spi.py", [*flags, "--seed", s, "--run-dir", str(runs[s])]) for s in runs})
    for seed, run in runs.items():
        assert done[seed].returncode == 0, done[seed].stderr
        returns = np.loadtxt(run / "episodes.csv", delimiter=",", skiprows=1)[-100:, 1]
        assert returns.mean() >= -100, seed


@pytest.mark.parametrize("script", [dream_spi, dream_spi_atari], ids=lambda script: script.__name__)
def test_every_logged_metric_is_documented(script, tmp_path):
    """By its own name or its family's, in docs/dreamspi.md, or as the siblings' metric in docs/method.md."""
    script.train(small_args(script, tmp_path / "run", iterations=2))
    docs = Path(script.__file__).parent / "docs"
    own, shared = ((docs / name).read_text(encoding="utf-8") for name in ("dreamspi.md", "method.md"))
    logged = read_events(tmp_path / "run")
    assert "imagination/return_error" in logged and "spi/planning_inside" in logged
    for tag in logged:
        family = "grad_norm_" if "grad_norm_" in tag else tag.split("/")[1]
        assert f"`{tag}`" in shared or family in own, tag
