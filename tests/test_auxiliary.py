"""SPR and DBC on PPO: each equation against a plain loop, where gradient flows, and what a run leaves behind."""

import ast
import gc
import math
import os
import re
import runpy
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dbc_ppo_atari as dbc
import ppo_baseline
import spr_ppo_atari as spr

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("script", [spr, dbc], ids=lambda script: script.__name__)
PLACEMENTS = ("additive", "utility", "gated")
A, B = 6, 3  # actions, chunks


@pytest.fixture(autouse=True)
def one_thread():
    """On which the bits depend."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def let_go():
    """What the end of a process does: nobody holds the run's folder any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    gc.collect()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_batch(script, L=8):
    """B chunks. The first has no end; the second one after its step 2, so that row 3 is a dummy; the third after 6."""
    torch.manual_seed(1)
    mask = torch.ones(B, L)
    mask[1, 3:4] = mask[2, 7:] = 0
    return script.Transitions(
        obs=torch.randint(0, 256, (B, L + 1, 84, 84, 4), dtype=torch.uint8),
        actions=torch.randint(0, A, (B * L,)),
        rewards=torch.randint(-1, 2, (B * L,)).float(),
        old_log_probs=(0.3 * torch.randn(B * L, A)).log_softmax(-1),
        advantages=3 * torch.randn(B * L) + 1,
        returns=torch.randn(B * L),
        mask=mask.flatten(),
    )


def make_agents(script):
    """An agent, and what else its loss takes: SPR's target, which is another agent."""
    torch.manual_seed(2)
    agents = [script.Agent(A) for _ in range(2 if script is spr else 1)]
    return agents[0], [agent.requires_grad_(False) for agent in agents[1:]]


def loss_of(script, agent, batch, others, noise, **settings):
    return script.compute_loss(agent, batch, script.Args(device="cpu", **settings), noise, *others)


def auxiliary_loss(script, agent, batch, others, noise, augmentation=True):
    """ℓ (M,), put together from the parts that the other tests look at."""
    if script is spr:
        return spr.spr_loss(*spr.look_ahead(agent, *others, batch, augmentation, noise), batch.mask)[0]
    z, next_z = dbc.latents(agent, batch)
    mean, std = agent.transition_model(z, batch.actions)
    rewards = agent.reward_decoder(mean + std * torch.randn(mean.shape, generator=noise)).squeeze(-1)
    l_b = dbc.bisimulation_loss(z, mean, std, batch.rewards, dbc.partners(batch.mask, noise), 0.99)
    return dbc.transition_loss(mean, std, next_z) + dbc.reward_loss(rewards, batch.rewards) + 0.5 * l_b


# ---- SPR: networks and views


def test_renormalized_latents_span_0_to_1_and_a_constant_one_is_0():
    z = torch.randn(3, 2, 2, 4)
    z[1] = 5.0
    z.requires_grad_()
    ours = spr.renormalize(z)
    for i in (0, 2):
        low, high = min(z[i].flatten().tolist()), max(z[i].flatten().tolist())
        expected = [(x - low) / (high - low) for x in z[i].flatten().tolist()]
        np.testing.assert_allclose(ours[i].flatten().tolist(), expected, rtol=1e-6, atol=1e-7)
    assert (ours[1] == 0).all()
    ours.square().sum().backward()
    assert z.grad.isfinite().all()


def test_transition_model_is_the_published_layers_in_their_order():
    """Channels first, one-hot planes, batch statistics by their formula; channels that differ by scale and shift."""
    torch.manual_seed(3)
    model = spr.TransitionModel((7, 7, 64), A)
    with torch.no_grad():
        model.layers[2].weight.uniform_(0.5, 2)
        model.layers[2].bias.uniform_(-1, 1)
    z, actions = torch.rand(5, 7, 7, 64), torch.tensor([0, 5, 2, 2, 1])
    x = torch.zeros(5, 64 + A, 7, 7)
    x[:, :64] = z.permute(0, 3, 1, 2)
    for i, a in enumerate(actions):
        x[i, 64 + a] = 1
    x = F.conv2d(x, model.layers[0].weight, model.layers[0].bias, padding=1).clamp(min=0)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    scale, shift = (p[None, :, None, None] for p in (model.layers[2].weight, model.layers[2].bias))
    x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
    x = F.conv2d(x, model.layers[3].weight, model.layers[3].bias, padding=1).clamp(min=0)
    expected = spr.renormalize(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(model(z, actions), expected, rtol=1e-4, atol=1e-5)


def test_batch_norms_statistics_enter_neither_acting_nor_the_loss():
    agent, target = make_agents(spr)
    batch = make_batch(spr)
    policy = agent.policy_and_value(agent.encode(batch.obs[:, 0]))
    loss, _ = loss_of(spr, agent, batch, target, seeded())
    assert agent.transition_model.layers[2].num_batches_tracked == spr.K
    agent.transition_model.layers[2].running_mean.fill_(1e3)
    for ours, theirs in zip(policy, agent.policy_and_value(agent.encode(batch.obs[:, 0])), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(loss, loss_of(spr, agent, batch, target, seeded())[0])


def test_augmentation_equals_a_pad_and_a_crop():
    """One shift and one factor a row, for its four frames; all 9 x 9 shifts occur."""
    frames = torch.randint(0, 256, (40, 84, 84, 4), dtype=torch.uint8)
    ours, noise = spr.augment(frames, seeded(5)).numpy(), seeded(5)
    shifts = torch.randint(-4, 5, (2, 40, 1), generator=noise).squeeze(-1).tolist()
    factors = [1 + 0.05 * min(max(x, -2), 2) for x in torch.randn(40, 1, 1, 1, generator=noise).flatten().tolist()]
    for i, (down, right, factor) in enumerate(zip(*shifts, factors, strict=True)):
        padded = np.pad(frames[i].numpy(), ((4, 4), (4, 4), (0, 0)), mode="edge")
        np.testing.assert_allclose(ours[i], factor * padded[4 + down :, 4 + right :][:84, :84], rtol=1e-6)
    assert set(shifts[0]) | set(shifts[1]) == set(range(-4, 5)) and len(set(factors)) > 30
    with torch.autocast("cpu", torch.bfloat16):  # the factor is rounded, and the product again
        in_bf16 = spr.augment(frames, seeded(5))
    assert in_bf16.dtype == torch.bfloat16
    np.testing.assert_allclose(in_bf16.float().numpy(), ours, rtol=2 * 2**-8 + 2**-16)


def test_dropout_stands_behind_each_layer_of_the_loss_and_nowhere_else():
    agent, _ = make_agents(spr)
    obs, noise = torch.randint(0, 256, (4, 84, 84, 4), dtype=torch.uint8), seeded()
    plain = x = (obs.permute(0, 3, 1, 2) / 255).contiguous(memory_format=torch.channels_last)
    for conv in agent.encoder[::2]:
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride).relu()
        plain = F.conv2d(plain, conv.weight, conv.bias, conv.stride).relu()
        kept = torch.empty_like(x).bernoulli_(0.5, generator=noise)
        assert 0.45 < kept.mean() < 0.55
        x = torch.where(kept > 0, 2 * x, 0.0)
    dropped = agent.encode(obs, dropout=seeded())
    torch.testing.assert_close(dropped, spr.renormalize(x.permute(0, 2, 3, 1)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent.encode(obs), spr.renormalize(plain.permute(0, 2, 3, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("augmentation", [True, False])
def test_the_views_of_agent_and_target_are_drawn_apart_and_ppo_sees_the_plain_frames(augmentation, monkeypatch):
    agent, (target,) = make_agents(spr)
    batch, seen = make_batch(spr), []
    encode = spr.Agent.encode
    monkeypatch.setattr(
        spr.Agent, "encode", lambda self, obs, *_, **how: seen.append((self, obs, how)) or encode(self, obs, **how)
    )
    loss_of(spr, agent, batch, [target], seeded(), augmentation=augmentation)
    (_, plain, how), (of_target, their_view, theirs), (of_agent, our_view, ours) = seen
    frames = batch.obs[:, :-1].flatten(0, 1)
    assert torch.equal(plain, frames) and how == {}
    assert of_target is target and of_agent is agent and len(their_view) == B * 9 and len(our_view) == B * 8
    if augmentation:
        their_view = their_view.unflatten(0, (B, 9))[:, :-1].flatten(0, 1)
        assert (
            not (their_view == our_view).flatten(1).all(-1).any() and not (our_view == frames).flatten(1).all(-1).any()
        )
    else:
        assert torch.equal(our_view, frames) and ours["dropout"] is theirs["dropout"] is not None


# ---- SPR: the loss


@pytest.mark.parametrize("L", [1, 3, 8])
def test_predictions_equal_one_row_at_a_time(L, monkeypatch):
    """With the actions really taken, and the targets of the very frame that is predicted."""
    agent, (target,) = make_agents(spr)
    batch = make_batch(spr, L)
    monkeypatch.setattr(spr, "augment", lambda frames, noise: frames)
    agent.eval()  # BatchNorm alone ties rows together
    with torch.no_grad():
        predictions, targets = spr.look_ahead(agent, target, batch, True, seeded())
        assert len(predictions) == min(L, 5) and targets.shape == (B, L + 1, 512)
        for b in range(B):
            for t in range(L + 1):
                z = target.encode(batch.obs[b, t][None])
                torch.testing.assert_close(targets[b, t], target.fc(z.flatten(1))[0], rtol=1e-4, atol=1e-5)
            for t in range(L):
                z = agent.encode(batch.obs[b, t][None])
                for k in range(1, min(5, L - t) + 1):
                    z = agent.transition_model(z, batch.actions[b * L + t + k - 1][None])
                    expected = agent.predictor(agent.fc(z.flatten(1)))[0]
                    torch.testing.assert_close(predictions[k - 1][b, t], expected, rtol=1e-4, atol=1e-5)


def plain_spr(predictions, targets, mask, L):
    """Row by row: k runs on until the chunk or the episode ends."""
    losses, pairs = [], []
    for b in range(B):
        for t in range(L):
            loss = count = 0
            for k in range(1, min(5, L - t) + 1):
                if not mask[b * L + t + k - 1]:  # the step from t + k - 1 on is none: there the episode is over
                    break
                x, y = predictions[k - 1][b, t].tolist(), targets[b, t + k].tolist()
                dot = sum(p * q for p, q in zip(x, y, strict=True))
                loss += 1 - dot / math.prod(max(math.sqrt(sum(p * p for p in v)), 1e-3) for v in (x, y))
                count += 1
            losses.append(loss)
            pairs.append(count)
    return losses, pairs


@pytest.mark.parametrize("L", [1, 3, 8])
def test_spr_loss_equals_a_plain_loop(L):
    """Of vectors of any length, 0 and nearly 0 too."""
    torch.manual_seed(4)
    mask = make_batch(spr, L).mask
    predictions = [torch.randn(B, L - k + 1, 16) for k in range(1, min(5, L) + 1)]
    predictions[0][0, 0], predictions[-1][1, 0] = 0, 1e-5
    targets = torch.randn(B, L + 1, 16)
    loss, pairs = spr.spr_loss(predictions, targets, mask)
    expected_loss, expected_pairs = plain_spr(predictions, targets, mask, L)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4, atol=1e-5)
    assert pairs.tolist() == expected_pairs


def test_the_step_that_ends_an_episode_is_the_last_that_is_predicted():
    mask = make_batch(spr).mask
    targets = torch.randn(B, 9, 16)
    _, pairs = spr.spr_loss([targets[:, k:] for k in range(1, 6)], targets, mask)
    assert pairs.view(B, 8).tolist() == [
        [5, 5, 5, 5, 4, 3, 2, 1],  # what is left of the chunk
        [3, 2, 1, 0, 4, 3, 2, 1],  # the end after step 2; row 3 only resets
        [5, 5, 5, 4, 3, 2, 1, 0],  # the end after step 6
    ]


def test_what_is_logged_of_spr_equals_plain_loops():
    agent, target = make_agents(spr)
    batch = make_batch(spr)
    with torch.no_grad():
        _, stats = loss_of(spr, agent, batch, target, seeded())
        predictions, targets = spr.look_ahead(agent, *target, batch, True, seeded())
        z = agent.encode(batch.obs[:, :8].flatten(0, 1)).flatten(1)
    copies = [targets[:, : 8 - k + 1] for k in range(1, 6)]
    means = [targets.mean((0, 1)).expand_as(x) for x in copies]
    real = batch.mask.bool().tolist()
    for name, guess in (("spr_loss", predictions), ("spr_loss_copy", copies), ("spr_loss_mean", means)):
        losses, pairs = plain_spr(guess, targets, batch.mask, 8)
        expected = sum(x for x, r in zip(losses, real, strict=True) if r) / sum(real)
        assert stats[f"world_model/{name}"].item() == pytest.approx(expected, rel=1e-3), name
    assert stats["world_model/masked_share"].item() == pytest.approx(1 - sum(pairs) / (5 * 24))
    assert stats["world_model/latent_variance"].item() == pytest.approx(z.numpy()[real].var(axis=0).mean(), rel=1e-4)


def test_spr_gradient_flows_where_it_must_and_nowhere_else(monkeypatch):
    agent, (target,) = make_agents(spr)
    batch, views, encode = make_batch(spr), [], spr.Agent.encode

    def recorded(agent, obs, *_):
        views.append(encode(agent, obs))
        if views[-1].requires_grad:
            views[-1].retain_grad()
        return views[-1]

    monkeypatch.setattr(spr.Agent, "encode", recorded)
    agent.transition_model.eval()  # with its own statistics, BatchNorm would tie every row to every other
    auxiliary_loss(spr, agent, batch, [target], seeded()).sum().backward()
    for name in ("encoder", "fc", "transition_model", "predictor"):
        assert all(p.grad.norm() > 0 for p in getattr(agent, name).parameters()), name
    assert all(p.grad is None for name in ("actor", "critic") for p in getattr(agent, name).parameters())
    assert all(p.grad is None for p in target.parameters()) and not views[0].requires_grad
    reached = views[1].grad.flatten(1).norm(dim=-1) > 0
    assert torch.equal(reached, batch.mask > 0)


# ---- SPR: the target


def test_target_moves_by_its_rate():
    agent, (target,) = make_agents(spr)
    old = [p.clone() for p in target.parameters()]
    for steps in (1, 2, 3):
        spr.follow(target, agent, rate=0.01)
        for p, before, new in zip(target.parameters(), old, agent.parameters(), strict=True):
            torch.testing.assert_close(p, new + 0.99**steps * (before - new), rtol=1e-4, atol=1e-6)
    spr.follow(target, agent, rate=1.0)
    assert all(torch.equal(*pair) for pair in zip(target.parameters(), agent.parameters(), strict=True))


# ---- DBC


def smooth_l1(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_dbc_losses_equal_plain_loops():
    torch.manual_seed(5)
    M, D = 12, 7
    z, next_z, mean = 2 * torch.randn(3, M, D)
    std, rewards = 1e-4 + torch.rand(M, D), torch.randint(-1, 2, (M,)).float()
    other, predicted = torch.randperm(M), torch.randn(M)
    l_p, l_r = dbc.transition_loss(mean, std, next_z), dbc.reward_loss(predicted, rewards)
    l_b = dbc.bisimulation_loss(z, mean, std, rewards, other, gamma=0.9)
    for i in range(M):
        j, likelihood, bisimulation = other[i].item(), 0.0, 0.0
        for d in range(D):
            x, y, m, n, s, u = (v.item() for v in (z[i, d], z[j, d], mean[i, d], mean[j, d], std[i, d], std[j, d]))
            likelihood += (0.5 * ((m - next_z[i, d].item()) / s) ** 2 + math.log(s)) / D
            distance = smooth_l1((rewards[i] - rewards[j]).item()) + 0.9 * math.sqrt((m - n) ** 2 + (s - u) ** 2)
            bisimulation += (smooth_l1(x - y) - distance) ** 2 / D
        assert l_p[i].item() == pytest.approx(likelihood, rel=1e-4)
        assert l_b[i].item() == pytest.approx(bisimulation, rel=1e-4, abs=1e-6)
        assert l_r[i].item() == pytest.approx((predicted[i] - rewards[i]).item() ** 2)


def test_transition_models_deviation_stays_between_its_bounds():
    model = dbc.TransitionModel(50, A)
    z, actions = torch.randn(8, 50), torch.arange(8) % A
    mean, std = model(z, actions)
    x = torch.cat((z, torch.eye(A)[actions]), dim=-1) @ model.hidden[0].weight.T + model.hidden[0].bias
    x = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(mean, x @ model.mean.weight.T + model.mean.bias, rtol=1e-4, atol=1e-5)
    raw = x @ model.std.weight.T + model.std.bias
    torch.testing.assert_close(std, 1e-4 + (10 - 1e-4) / (1 + (-raw).exp()), rtol=1e-4, atol=1e-5)
    for bias, bound in ((-1e4, 1e-4), (1e4, 10.0)):
        nn.init.constant_(model.std.bias, bias)
        torch.testing.assert_close(model(z, actions)[1], torch.full((8, 50), bound))


def test_partners_are_a_permutation_within_the_real_rows():
    mask = make_batch(dbc).mask
    drawn = [dbc.partners(mask, seeded(seed)) for seed in range(20)]
    for other in drawn:
        assert sorted(other.tolist()) == list(range(len(mask)))
        assert torch.equal(mask[other], mask)
    assert len({tuple(other.tolist()) for other in drawn}) == 20
    assert len({other[0].item() for other in drawn}) > 8  # of 22 real rows
    assert sorted(dbc.partners(torch.zeros(4), seeded()).tolist()) == [0, 1, 2, 3]


def test_dbc_gradient_flows_where_it_must_and_nowhere_else():
    torch.manual_seed(6)
    z, next_z, mean = torch.randn(3, 8, 5).requires_grad_().unbind(0)
    for x in (z, next_z, mean):
        x.retain_grad()
    std = torch.rand(8, 5).add(0.1).requires_grad_()
    rewards, other = torch.tensor([0.0, 1.0] * 4), torch.arange(8).roll(1)
    dbc.transition_loss(mean, std, next_z).sum().backward(retain_graph=True)
    assert next_z.grad is None and (mean.grad != 0).all() and (std.grad != 0).all()
    mean.grad = std.grad = None
    weight = torch.zeros(8).index_fill(0, torch.tensor([3]), 1.0)  # one pair, (3, 2): both of its ends learn
    (weight * dbc.bisimulation_loss(z, mean, std, rewards, other, 0.99)).sum().backward()
    assert mean.grad is None and std.grad is None
    assert (z.grad[2:4] != 0).all() and (z.grad[[0, 1, 4, 5, 6, 7]] == 0).all()

    agent, _ = make_agents(dbc)
    auxiliary_loss(dbc, agent, make_batch(dbc), [], seeded()).sum().backward()
    for name in ("encoder", "bottleneck", "transition_model", "reward_decoder"):
        assert all(p.grad.norm() > 0 for p in getattr(agent, name).parameters()), name
    assert all(p.grad is None for name in ("fc", "actor", "critic") for p in getattr(agent, name).parameters())


def test_what_is_logged_of_dbc_equals_plain_loops():
    agent, _ = make_agents(dbc)
    batch, noise = make_batch(dbc), seeded()
    with torch.no_grad():
        _, stats = loss_of(dbc, agent, batch, [], seeded())
        z, next_z = (x.double().numpy() for x in dbc.latents(agent, batch))
        mean, std = agent.transition_model(*(dbc.latents(agent, batch)[0], batch.actions))
        sample = mean + std * torch.randn(mean.shape, generator=noise)
        other = dbc.partners(batch.mask, noise)
        zero = dbc.bisimulation_loss(torch.ones_like(mean), mean, std, batch.rewards, other, 0.99)
        decoded = agent.reward_decoder(sample).squeeze(-1)
    real = batch.mask.numpy() > 0
    z, next_z, mean, std = z[real], next_z[real], mean.double().numpy()[real], std.double().numpy()[real]
    rewards = batch.rewards.numpy()[real]
    rms = np.sqrt(((z - next_z) ** 2).mean(0))
    expected = {
        "transition_loss": (0.5 * ((mean - next_z) / std) ** 2 + np.log(std)).mean(),
        "transition_loss_copy": (0.5 + np.log(rms)).mean(),  # the least that any constant deviation gives
        "transition_error_ratio": ((mean - next_z) ** 2).mean() / ((z - next_z) ** 2).mean(),
        "transition_std": std.mean(),
        "latent_variance": z.var(axis=0).mean(),
        "reward_loss": ((decoded.numpy()[real] - rewards) ** 2).mean(),
        "reward_loss_zero": (rewards**2).mean(),
        "bisimulation_loss_constant": zero.numpy()[real].mean(),
    }
    for name, value in expected.items():
        assert stats[f"world_model/{name}"].item() == pytest.approx(value, rel=1e-3), name


# ---- Both: where the loss stands


@pytest.mark.parametrize("placement", PLACEMENTS)
@BOTH
def test_placements(script, placement):
    """The loss by its formula, and its gradient on the world model: what each row's ℓ is weighed with."""
    agent, others = make_agents(script)
    batch, coef = make_batch(script), 0.7
    name = "spr_loss_coef" if script is spr else "dbc_loss_coef"
    loss, stats = loss_of(script, agent, batch, others, seeded(), loss_placement=placement, **{name: coef})
    loss.backward()
    model = list(agent.transition_model.parameters())
    ours = torch.cat([p.grad.flatten() for p in model])

    ell = auxiliary_loss(script, agent, batch, others, seeded())
    with torch.no_grad():
        log_probs, values = agent.policy_and_value(agent.encode(batch.obs[:, :8].flatten(0, 1)))
        real = batch.mask > 0
        A_ = batch.advantages[real]
        U = (A_ - A_.mean()) / A_.std(correction=0) - (coef * ell[real] if placement != "additive" else 0)
        ratio = (log_probs - batch.old_log_probs).gather(1, batch.actions[:, None]).squeeze(1).exp()[real]
        clipped = ratio.clamp(0.9, 1.1)
        active = clipped * U < ratio * U
        expected = -torch.min(ratio * U, clipped * U).mean() + 0.25 * (values - batch.returns)[real].square().mean()
        expected += 0.01 * (log_probs.exp() * log_probs).sum(-1)[real].mean()
        if placement == "additive":
            expected += coef * ell[real].mean()
    assert active.any() and not active.all()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert stats["spi/penalty_mean"].item() == pytest.approx(coef * ell[real].mean().item(), rel=1e-4)

    weight = {
        "additive": torch.ones_like(ratio),
        "utility": torch.where(active, clipped, ratio),  # what the clip does not stop
        "gated": torch.where(active, 0.0, ratio),
    }[placement]
    gradients = torch.autograd.grad(coef * (weight * ell[real]).sum() / real.sum(), model)
    theirs = torch.cat([g.flatten() for g in gradients])
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@BOTH
def test_additive_leaves_the_heads_gradient_alone(script):
    agent, others = make_agents(script)
    batch = make_batch(script)

    def actor_gradient(noise, placement):
        agent.zero_grad()
        loss_of(script, agent, batch, others, noise, loss_placement=placement)[0].backward()
        return agent.actor.weight.grad.clone()

    assert torch.equal(actor_gradient(None, "additive"), actor_gradient(seeded(), "additive"))
    assert not torch.equal(actor_gradient(None, "utility"), actor_gradient(seeded(), "utility"))


@BOTH
def test_dummy_rows_change_nothing(script):
    """Nor do SPR's, but for BatchNorm's statistics: here they are held."""
    agent, others = make_agents(script)
    agent.transition_model.eval()
    batch = make_batch(script)
    dummy = batch.mask == 0
    other = batch._replace(
        actions=torch.where(dummy, 5 - batch.actions, batch.actions),
        rewards=torch.where(dummy, 9.0, batch.rewards),
        advantages=torch.where(dummy, 1e3, batch.advantages),
        returns=torch.where(dummy, -1e3, batch.returns),
        old_log_probs=torch.where(dummy[:, None], -5.0, batch.old_log_probs),
    )
    gradients = []
    for a_batch in (batch, other):
        agent.zero_grad()
        loss_of(script, agent, a_batch, others, seeded())[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("augmentation", [True, False])
@BOTH
def test_the_loss_runs_on_another_device_and_never_waits_for_it(script, augmentation, monkeypatch):
    """On "meta", where mixing it with the CPU and reading a value are errors."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    agent, others = make_agents(script)
    agent, others = agent.to("meta"), [other.to("meta") for other in others]
    batch = script.Transitions(*(x.to("meta") for x in make_batch(script)))
    settings = {"augmentation": augmentation} if script is spr else {}
    for placement in PLACEMENTS:
        loss, stats = loss_of(script, agent, batch, others, seeded(), loss_placement=placement, **settings)
        loss.backward()
        if others:
            spr.follow(*others, agent, 0.01)
    assert loss.is_meta and all(value.is_meta for value in stats.values())
    with pytest.raises(RuntimeError):
        loss.item()


@BOTH
def test_every_weight_learns_in_bf16_and_losses_are_float32(script):
    agent, others = make_agents(script)
    batch = make_batch(script)
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = loss_of(script, agent, batch, others, seeded())
        assert agent.encode(batch.obs[:, 0]).dtype == (torch.bfloat16 if script is spr else torch.float32)
    loss.backward()
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in stats.values())
    assert all(value.isfinite().all() for value in stats.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in agent.parameters())
    exact, _ = loss_of(script, agent, batch, others, seeded())
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)


# ---- Runs


def small_args(script, folder, iterations=2, **settings):
    """Two updates an iteration, of 8 rows each."""
    sizes = {
        "num_envs": 2,
        "num_steps": 8,
        "num_minibatches": 2,
        "update_epochs": 1,
        "total_timesteps": 16 * iterations,
    }
    return script.Args(run_dir=str(folder), seed=3, device="cpu", precision="fp32", **{**sizes, **settings})


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flat(state):
    """Every tensor of a state of dicts and lists, by path."""
    if isinstance(state, torch.Tensor):
        return {"": state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {f"{key}/{path}": tensor for key, value in items for path, tensor in flat(value).items()}


def assert_bit_equal(first, second):
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys() and first
    for name in first:
        assert torch.equal(first[name], second[name]), name


def logged(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class NarrowBaseline(ppo_baseline.Agent):
    """The baseline's agent, with 50 normalised numbers between φ and the head."""

    def __init__(self, num_actions):
        nn.Module.__init__(self)
        init, convs = ppo_baseline.layer_init, ((4, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))
        layers = [layer for conv in convs for layer in (init(nn.Conv2d(*conv)), nn.ReLU(inplace=True))]
        self.encoder = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.bottleneck = nn.Sequential(init(nn.Linear(3136, 50), gain=1.0), nn.LayerNorm(50))
        self.fc = init(nn.Linear(50, 512))
        self.actor, self.critic = init(nn.Linear(512, num_actions), gain=0.01), init(nn.Linear(512, 1), gain=1.0)

    def encode(self, obs):
        return self.bottleneck(super().encode(obs).flatten(1))


class RenormalizedBaseline(ppo_baseline.Agent):
    """The baseline's agent, with latents between 0 and 1."""

    def encode(self, obs):
        return spr.renormalize(super().encode(obs))


@BOTH
def test_coefficient_0_is_the_baseline_to_the_last_bit(script, monkeypatch, tmp_path):
    """Of SPR: the baseline with renormalised latents. Of DBC: the baseline with the bottleneck. No draw differs."""
    name = "spr_loss_coef" if script is spr else "dbc_loss_coef"
    script.train(small_args(script, tmp_path / "ours", **{name: 0.0}))
    with monkeypatch.context() as patch:
        patch.setattr(ppo_baseline, "Agent", RenormalizedBaseline if script is spr else NarrowBaseline)
        ppo_baseline.train(small_args(ppo_baseline, tmp_path / "theirs"))
    ours, theirs = checkpoint(tmp_path / "ours"), checkpoint(tmp_path / "theirs")
    assert_bit_equal({key: ours["agent"][key] for key in theirs["agent"]}, theirs["agent"])
    assert torch.equal(ours["rng"], theirs["rng"])
    ours, theirs = logged(tmp_path / "ours"), logged(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for tag in ours.keys() - {"charts/SPS", "losses/weight_norm"}:  # the unused weights have a norm
        assert ours[tag] == theirs[tag], tag
    script.train(small_args(script, tmp_path / "on"))
    on = checkpoint(tmp_path / "on")["agent"]
    assert not torch.equal(on["encoder.0.weight"], checkpoint(tmp_path / "ours")["agent"]["encoder.0.weight"])


@BOTH
@pytest.mark.parametrize("chunk_length", [4, 8])
def test_chunks_are_what_happened_up_to_the_frame_after_them(script, chunk_length, monkeypatch, tmp_path):
    """A frame stands before its action, the last one is what came after the chunk; each iteration has new noise."""
    games, step, compute_loss, played, losses = [], script.Games.step, script.compute_loss, [], []

    def recorded_step(self, actions):
        made = step(self, actions)
        played.append((actions.clone(), *(x.clone() for x in made[:2])))
        return made

    def recorded_reset(self):
        games.append(reset(self))
        return games[-1].clone()

    def recorded_loss(agent, batch, args, noise, *others):
        losses.append((batch, noise.initial_seed()))
        return compute_loss(agent, batch, args, noise, *others)

    reset = script.Games.reset
    monkeypatch.setattr(script.Games, "step", recorded_step)
    monkeypatch.setattr(script.Games, "reset", recorded_reset)
    monkeypatch.setattr(script, "compute_loss", recorded_loss)
    T, N, iterations = 8, 2, 2
    args = small_args(
        script, tmp_path / "run", iterations, chunk_length=chunk_length, noop_max=30, env_id="Breakout-v5"
    )
    script.train(args)
    actions, frames, rewards = (torch.stack(column) for column in zip(*played, strict=True))
    frames = torch.cat((games[0][None], frames))  # (T · iterations + 1, N, ...)
    minibatches, seen = len(losses) // iterations, set()
    for k, (batch, seed) in enumerate(losses):
        start = k // minibatches * T
        others = [other for j, (_, other) in enumerate(losses) if j // minibatches != k // minibatches]
        assert seed not in others
        for chunk, obs in enumerate(batch.obs):
            starts = [(t, n) for t in range(start, start + T, chunk_length) for n in range(N)]
            own = slice(chunk * chunk_length, (chunk + 1) * chunk_length)
            found = [
                (t, n)
                for t, n in starts
                if torch.equal(obs, frames[t : t + chunk_length + 1, n])
                and torch.equal(batch.actions[own], actions[t : t + chunk_length, n])
                and torch.equal(batch.rewards[own], rewards[t : t + chunk_length, n])
            ]
            assert len(found) == 1
            seen |= set(found)
    assert len(seen) == T * iterations * N // chunk_length


@pytest.mark.parametrize("augmentation, rate", [(True, 1.0), (False, 0.01)])
def test_the_target_follows_after_each_step_of_the_optimizer(augmentation, rate, monkeypatch, tmp_path):
    """From the agent's own start on; and it is in the checkpoint."""
    follow, expected = spr.follow, []

    def recorded(target, agent, rate):
        now = [p.clone() for p in agent.parameters()]
        before = expected[-1] if expected else [p.clone() for p in target.parameters()]
        follow(target, agent, rate)
        expected.append([old + rate * (new - old) for old, new in zip(before, now, strict=True)])
        rates.append(rate)

    rates = []
    monkeypatch.setattr(spr, "follow", recorded)
    spr.train(small_args(spr, tmp_path / "run", augmentation=augmentation))
    assert rates == [rate] * 4
    state = checkpoint(tmp_path / "run")
    agent = spr.Agent(A)
    agent.load_state_dict(state["target"])
    for ours, theirs in zip(agent.parameters(), expected[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    names = [name for name, _ in agent.named_parameters()]
    same = [torch.equal(state["agent"][name], state["target"][name]) for name in names]
    assert all(same) if augmentation else not any(same)
    assert state["agent"]["transition_model.layers.2.num_batches_tracked"] == 4 * spr.K


def test_the_target_starts_as_the_agent(monkeypatch, tmp_path):
    monkeypatch.setattr(spr, "follow", lambda target, agent, rate: None)
    spr.train(small_args(spr, tmp_path / "run", iterations=1))
    torch.manual_seed(3)  # as train does, just before it makes the agent
    assert_bit_equal(checkpoint(tmp_path / "run")["target"], spr.Agent(A).state_dict())


@pytest.mark.parametrize("script, settings", [(spr, {"augmentation": False}), (spr, {}), (dbc, {})])
def test_resumed_run_equals_the_uninterrupted_one(script, settings, monkeypatch, tmp_path):
    """To the last bit, if that one too starts new games there: what a checkpoint cannot keep."""
    args = small_args(script, tmp_path / "interrupted", iterations=4, loss_placement="utility", **settings)
    compute_gae, calls = script.compute_gae, []

    def stopping(*inputs):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_gae(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(script, "compute_gae", stopping)
        with pytest.raises(SystemExit, match="75"):
            script.train(args)
    let_go()
    time.sleep(1.1)  # TensorBoard orders a run's files by the second
    script.train(args)

    end_iteration = script.Run.end_iteration

    def new_games(run, *inputs):
        end_iteration(run, *inputs)
        if run.iterations == 2:
            own = sys._getframe(1).f_locals  # of train
            vars(own["games"]).update(vars(script.Games(run.args, run.iterations)))
            own["obs"][-1], own["is_last"][-1] = own["games"].reset(), False

    monkeypatch.setattr(script.Run, "end_iteration", new_games)
    script.train(replace(args, run_dir=str(tmp_path / "whole")))
    ours, theirs = checkpoint(tmp_path / "interrupted"), checkpoint(tmp_path / "whole")
    for key in ("agent", "optimizer", "rng", *(["target"] if script is spr else [])):
        assert_bit_equal(ours[key], theirs[key])
    ours, theirs = logged(tmp_path / "interrupted"), logged(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and len(ours["losses/policy_loss"]) == 4
    assert all(ours[tag] == theirs[tag] for tag in ours.keys() - {"charts/SPS"})


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (spr, "--spr-loss-coef -1", "--spr-loss-coef: got -1.0; must be finite and at least 0"),
        (spr, "--spr-loss-coef nan", "--spr-loss-coef: got nan"),
        (dbc, "--dbc-loss-coef inf", "--dbc-loss-coef: got inf"),
        (dbc, "--env-id CartPole-v1", "--env-id: got 'CartPole-v1'; must be an Atari game"),
        (spr, "--chunk-length 3", "--chunk-length: got 3; must divide num_steps = 8"),
        (dbc, "--run-dir DIR", "is a run with --dbc-loss-coef 1.0, not 0.5"),
    ],
)
def test_bad_input_is_refused_in_one_line(script, flags, words, monkeypatch, tmp_path, capsys):
    if "DIR" in flags:
        script.train(small_args(script, tmp_path / "run", iterations=1))
        small = (
            "--num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 1 --seed 3 --device cpu --precision fp32"
        )
        flags = f"{small} --total-timesteps 32 --dbc-loss-coef 0.5 --run-dir {tmp_path / 'run'}"
        let_go()
        capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags.split()])
    monkeypatch.setattr("envpool.make", lambda *_, **__: pytest.fail("an environment was built"))
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(script.__file__, run_name="__main__")
    captured = capsys.readouterr()
    assert refused.value.code == 2 and captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ") and words in line


# ---- The text


def definitions(text):
    """Source of each top-level function and class."""
    lines = text.splitlines()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {
        node.name: "\n".join(lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno])
        for node in nodes
    }


@BOTH
def test_what_is_shared_is_one_text(script):
    ours = Path(script.__file__).read_text()
    for other, allowed in (
        ("ppo_baseline.py", {"Args", "Transitions", "Agent", "compute_loss", "train"}),
        (
            "deep_spi_ppo_atari.py",
            {"Args", "Agent", "TransitionModel", "what_the_model_knows", "compute_loss", "train"},
        ),
    ):
        theirs = (ROOT / other).read_text()
        first, second = definitions(ours), definitions(theirs)
        differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
        own = {"reward_loss", "transition_loss"} if script is dbc and "deep" in other else set()
        assert differing == own | allowed, other
    # The baseline's rooms of arguments, but for the method's flags; of the games; and of the run's folder.
    rooms = [
        re.split(r"^# ==== \d\. .*$", text, flags=re.MULTILINE)
        for text in (ours, (ROOT / "ppo_baseline.py").read_text())
    ]
    assert [len(parts) for parts in rooms] == [7, 7]
    flags = re.search(r"    # ---- (SPR|DBC)\n(    \w+: .*\n)+\n", rooms[0][1])
    assert rooms[0][1].replace(flags[0], "") == rooms[1][1]
    assert rooms[0][2] == rooms[1][2] and rooms[0][6] == rooms[1][6]


@BOTH
def test_the_script_can_be_read_in_one_sitting(script):
    text = Path(script.__file__).read_text()
    assert len(text.splitlines()) <= 655 and len(definitions(text)["train"].splitlines()) <= 95
