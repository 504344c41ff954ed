"""benchmark/peers/dream_spi_published.py: without a flag it is the script; each flag does as the published code."""

import copy
from dataclasses import fields, replace

import pytest
import torch

import dream_spi
from benchmark.peers import dream_spi_published as peer
from benchmark.suites import PUBLISHED_WAYS

SMALL = {"num_envs": 8, "num_steps": 16, "total_timesteps": 256, "horizon": 3, "device": "cpu"}
SIZES = (4, 2)  # inputs and actions of CartPole-v1


def weights(module, args, folder):
    module.train(replace(args, run_dir=str(folder)))
    return torch.load(folder / "agent.pt", weights_only=True)


@pytest.fixture(scope="module")
def of_the_script(tmp_path_factory):
    return weights(dream_spi, dream_spi.Args(**SMALL), tmp_path_factory.mktemp("script") / "run")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_without_a_flag_it_is_the_script(of_the_script, tmp_path):
    assert same(of_the_script, weights(peer, peer.Args(**SMALL), tmp_path / "run"))
    own = {field.name for field in fields(peer.Args)} - {field.name for field in fields(dream_spi.Args)}
    assert own == set(PUBLISHED_WAYS)


@pytest.mark.parametrize("flag", PUBLISHED_WAYS)
def test_each_flag_changes_what_is_learned(of_the_script, tmp_path, flag, monkeypatch):
    script, settings = of_the_script, SMALL
    if flag == "final_limits":  # whose first limits come after 500 steps of Acrobot-v1
        settings = SMALL | {"env_id": "Acrobot-v1", "num_steps": 512, "total_timesteps": 4096, "update_epochs": 1}
        script = weights(dream_spi, dream_spi.Args(**settings), tmp_path / "script")
    assert not same(script, weights(peer, peer.Args(**settings, **{flag: True}), tmp_path / "run"))


@pytest.mark.parametrize("flag, functions", [("stale_gradients", ["StaleLoss"]), ("learned_dummies", ["ones_like"])])
def test_both_updates_are_published_ones(tmp_path, flag, functions, monkeypatch):
    """Real data and imagination: a stale copy for each update of each of two iterations; masks of ones in both."""
    copies, masks = [], {"model_loss": [], "imagine": []}
    monkeypatch.setattr(
        peer.copy, "deepcopy", lambda agent, deepcopy=copy.deepcopy: copies.append(1) or deepcopy(agent)
    )
    monkeypatch.setattr(
        peer,
        "MODEL_LOSS",
        lambda of, batch, *o, f=peer.MODEL_LOSS: masks["model_loss"].append(batch.mask) or f(of, batch, *o),
    )
    monkeypatch.setattr(
        peer, "IMAGINE", lambda of, z, mask, *o, f=peer.IMAGINE: masks["imagine"].append(mask) or f(of, z, mask, *o)
    )
    settings = SMALL | {"num_steps": 32, "total_timesteps": 2 * 8 * 32}
    peer.train(peer.Args(**settings, **{flag: True}, run_dir=str(tmp_path / "run")))
    assert len(copies) == (4 if flag == "stale_gradients" else 0)
    for seen in masks.values():
        assert seen and all(bool(mask.all()) for mask in seen) == (flag == "learned_dummies")


def test_a_quarter_of_the_dones_is_lost():
    torch.manual_seed(0)
    agent, starts = dream_spi.Agent(*SIZES), 4096
    with torch.no_grad():
        agent.world_model["done"][-1].bias += 1.0  # an end is likely
        z = agent.encode(torch.randn(starts, SIZES[0]))
        noise = dream_spi.gumbel(4, starts, SIZES[1]), dream_spi.gumbel(4, starts, *z.shape[1:])
        given = agent, z, torch.ones(starts), *noise, torch.rand(4, starts).logit(), peer.Args(**SMALL)
        all_dones = dream_spi.imagine(*given).next_is_terminal[0]  # of the first step: later ones start elsewhere
        dones = peer.Published(peer.Args(**SMALL, lost_dones=True)).imagine(*given).next_is_terminal[0]
    assert 0 < all_dones.mean() < 1 and (dones <= all_dones).all()
    assert 1 - dones.sum() / all_dones.sum() == pytest.approx(0.25, abs=0.04)


def batch_with_dummies(agent):
    """Two chunks of three steps; the second row of each is a dummy."""
    torch.manual_seed(1)
    rows = 6
    mask, terminal = torch.tensor([1.0, 0, 1] * 2), torch.tensor([1.0, 0, 0] * 2)
    log_probs = torch.full((rows, SIZES[1]), 0.5).log()
    return dream_spi.Transitions(
        torch.randn(2, 4, SIZES[0]), torch.zeros(rows, dtype=torch.int64), torch.randn(rows), log_probs,
        torch.randn(rows), torch.randn(rows), terminal, mask,
    )  # fmt: skip


def test_dummies_are_learned_as_not_terminal_and_unchanged():
    torch.manual_seed(0)
    agent, args = dream_spi.Agent(*SIZES), peer.Args(**SMALL, learned_dummies=True)
    batch = batch_with_dummies(agent)
    noise = dream_spi.gumbel(6, dream_spi.NUM_VARIABLES, dream_spi.NUM_CLASSES)
    _, stats = peer.Published(args).model_loss(agent, batch, noise, args)
    losses = []
    for chunk in range(2):
        for step in range(3):
            row = 3 * chunk + step
            obs, following = batch.obs[chunk, step], batch.obs[chunk, step + 1]
            z, next_z = agent.encode(obs[None]), agent.encode((following if batch.mask[row] else obs)[None])
            predicted = agent.transition_model(z, batch.actions[row : row + 1], noise[row : row + 1])
            done = dream_spi.done_loss(agent.done_model(next_z), batch.next_is_terminal[row : row + 1])
            losses.append((dream_spi.transition_loss(predicted, next_z).item(), done.item()))
    transition, done = torch.tensor(losses).mean(0)
    assert stats["world_model/transition_loss"] == pytest.approx(transition.item(), abs=1e-6)
    assert stats["world_model/done_loss"] == pytest.approx(done.item(), abs=1e-6)


def test_stale_gradients_are_those_at_the_old_weights_of_the_second_part():
    torch.manual_seed(0)
    agent, args = dream_spi.Agent(*SIZES), peer.Args(**SMALL, stale_gradients=True)
    batch, published = batch_with_dummies(agent), peer.Published(args)
    noise = dream_spi.gumbel(6, dream_spi.NUM_VARIABLES, dream_spi.NUM_CLASSES)
    optimizer, before = dream_spi.make_optimizer(agent, args), copy.deepcopy(agent)
    for _ in range(2):
        loss, _ = published.model_loss(agent, batch, noise, args)
        dream_spi.optimizer_step(optimizer, loss, dream_spi.MODEL, args.max_grad_norm)
    mixed = copy.deepcopy(agent)  # as it is: of the last step the gradients were taken before it
    loss, _ = published.model_loss(agent, batch, noise, args)
    loss.backward(inputs=[p for name in dream_spi.MODEL for p in agent.parts()[name]])
    with torch.no_grad():
        for ours, old in zip(mixed.parts()["world_model"], before.parts()["world_model"], strict=True):
            ours.copy_(old)
    dream_spi.model_loss(mixed, batch, noise, args)[0].backward()
    for name in dream_spi.MODEL:
        for ours, theirs in zip(agent.parts()[name], mixed.parts()[name], strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_a_limit_is_an_end():
    args = peer.Args(**SMALL | {"env_id": "Acrobot-v1"})
    limits = 0
    for kind in (dream_spi.Games, peer.FinalLimits):
        games = kind(args)
        games.reset()
        torch.manual_seed(0)
        for _ in range(505):
            _, _, is_terminal, is_last, _ = games.step(torch.zeros(8, dtype=torch.int64))  # never swings up
            is_terminal, is_last = torch.as_tensor(is_terminal), torch.as_tensor(is_last)
            assert kind is dream_spi.Games or torch.equal(is_terminal, is_last)
            limits += int((is_last & ~is_terminal).sum()) if kind is dream_spi.Games else 0
    assert limits == 8
