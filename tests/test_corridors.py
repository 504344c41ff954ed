"""benchmark/peers/deep_spi_corridors.py: Deep SPI's Atari agent in the corridors, whose values are exact."""

import json

import numpy as np
import pytest
import torch

import confounding_gridworld
import deep_spi_ppo_atari
from benchmark.common import read_events
from benchmark.peers import deep_spi_corridors as peer

SMALL = {"num_envs": 8, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 192, "device": "cpu"}


def test_a_picture_that_is_encoded_once_is_encoded_the_same():
    torch.manual_seed(0)
    agent, games = peer.Agent(4, 5), peer.Games(peer.Args(**SMALL))
    frames = torch.from_numpy(games.frames[[3, 0, 3, 7]])
    plain = deep_spi_ppo_atari.Agent.encode(agent, frames[..., :1])
    torch.testing.assert_close(agent.encode(frames), plain)
    gradients = []
    for z in (agent.encode(frames), plain):
        agent.zero_grad()
        (z * torch.arange(4.0)[:, None, None, None]).sum().backward()
        gradients.append(agent.encoder[0].weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "flags", [{}, {"reward_loss_coef": 0.0, "transition_loss_coef": 0.0}, {"published_norm": True}]
)
def test_a_run_logs_the_exact_value(tmp_path, flags):
    args = peer.Args(**SMALL, **flags, run_dir=str(tmp_path / "run"))
    peer.train(args)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["script"] == "deep_spi_corridors.py"
    events = read_events(tmp_path / "run")
    agent, world = peer.Agent(4, 5), args.world
    agent.load_state_dict(torch.load(tmp_path / "run" / "agent.pt", weights_only=True))
    with torch.no_grad():
        z = agent.encode(torch.from_numpy(peer.Games(args).frames))
        pi = agent.policy_and_value(z)[0].exp().double().numpy()
    value = np.zeros(len(pi))
    for _ in range(3000):  # V = Σ π (R + γ P V), again and again
        value = (pi * (world.R + args.gamma * world.P @ value)).sum(1)
    assert events["corridors/value"][1][-1] == pytest.approx(value[world.start], rel=1e-4)
    top, bottom = world.critical
    assert events["corridors/distance"][1][-1] == pytest.approx((z[top] - z[bottom]).square().mean().item(), rel=1e-4)


def test_rewards_are_as_they_are_and_episodes_are_counted():
    games = peer.Games(peer.Args(**SMALL))
    games.reset()
    right, up = confounding_gridworld.RIGHT, confounding_gridworld.UP
    total = torch.zeros(8)
    for action in [right] * 6 + [up]:  # I, @, the corridor's five cells; at its end '!' UP
        _, rewards, is_terminal, is_last, episodes = games.step(torch.full((8,), action))
        total += rewards
    assert is_terminal.all() and is_last.all() and set(episodes) == set(range(8))
    good, bad = 4 + 5 / 0.99**5, 4 - 1.8 * 5 / (0.2 * 0.99**5)
    assert all(min(abs(x - good), abs(x - bad)) < 1e-3 for x in total.tolist())
    assert episodes[0] == (pytest.approx(total[0].item()), 7)


def test_dummies_count_as_published_where_that_is_asked_for():
    torch.manual_seed(0)
    agent, games = peer.Agent(4, 5), peer.Games(peer.Args(**SMALL))
    frames = torch.from_numpy(games.frames[torch.tensor([[0, 1, 2], [5, 0, 1]])])  # (2 chunks, L + 1 = 3 frames)
    mask, actions = torch.tensor([1.0, 1, 0, 1]), torch.zeros(4, dtype=torch.int64)
    batch = deep_spi_ppo_atari.Transitions(
        frames, actions, torch.ones(4), torch.full((4, 4), 0.25).log(), torch.randn(4), torch.randn(4), mask
    )
    noise = torch.zeros(4, *agent.transition_model.noise_shape)
    _, stats = peer.loss_with_dummies(agent, batch, peer.Args(**SMALL), noise)
    z = agent.encode(frames.flatten(0, 1)).unflatten(0, (2, 3))
    now, following = z[:, :2].flatten(0, 1), z[:, 1:].flatten(0, 1).clone()
    following[2] = now[2]
    predicted = agent.transition_model(now, actions, noise)
    expected = deep_spi_ppo_atari.transition_loss(predicted, following).mean()
    assert stats["world_model/transition_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_bad_input_is_refused_in_one_line(capsys):
    for flags in ({"env_id": "Pong-v5"}, {"n_path": 1}, {"epsilon": 0.0}):
        with pytest.raises(SystemExit) as refused:
            peer.Args(**SMALL, **flags)
        assert refused.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
