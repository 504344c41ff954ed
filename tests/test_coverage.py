"""The peers that tell what a rollout covers: their metrics, the early end, and that else they are the script."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deep_spi_ppo
import deep_spi_ppo_atari
import evaluate
from benchmark.common import read_events
from benchmark.peers import deep_spi_ppo_atari_coverage, deep_spi_ppo_coverage
from benchmark.peers.coverage import share_of_distinct

SMALL = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "device": "cpu", "precision": "fp32"}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "agent.pt", weights_only=True)


@pytest.mark.parametrize(
    "script, peer, same",
    [
        (deep_spi_ppo, deep_spi_ppo_coverage, {}),
        (deep_spi_ppo_atari, deep_spi_ppo_atari_coverage, {"anneal_over": 96}),
    ],
    ids=["vectors", "Atari"],
)
def test_a_run_with_three_more_metrics_is_the_script_s_run(script, peer, same, tmp_path):
    script.train(script.Args(total_timesteps=96, run_dir=str(tmp_path / "script"), **SMALL))
    peer.train(peer.Args(total_timesteps=96, run_dir=str(tmp_path / "peer"), **SMALL, **same))
    ours, theirs = weights(tmp_path / "peer"), weights(tmp_path / "script")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = read_events(tmp_path / "peer"), read_events(tmp_path / "script")
    assert ours.keys() - theirs.keys() == {
        "coverage/distinct",
        "coverage/observation_variance",
        "coverage/latent_variance",
    }
    assert all(0 < share <= 1 for share in ours["coverage/distinct"][1])
    assert all(min(ours[f"coverage/{of}_variance"][1]) > 0 for of in ("observation", "latent"))


def test_the_metrics_are_of_the_last_rollout_and_the_agent_after_it(tmp_path, monkeypatch):
    frames = []
    step = deep_spi_ppo_atari.Games.step

    def record(games, actions):
        result = step(games, actions)
        frames.append(result[0])
        return result

    monkeypatch.setattr(deep_spi_ppo_atari.Games, "step", record)
    peer = deep_spi_ppo_atari_coverage
    peer.train(peer.Args(total_timesteps=64, run_dir=str(tmp_path), **SMALL))
    events, rows = read_events(tmp_path), torch.cat(frames[-8:])
    agent = peer.Agent(6)
    agent.load_state_dict(weights(tmp_path))
    with torch.no_grad():
        variance = agent.encode(rows).flatten(1).double().var(0, correction=0).mean()
    assert events["coverage/latent_variance"][1][-1] == pytest.approx(variance.item(), rel=1e-4)
    pixels = rows.flatten(1).double().var(0, correction=0).mean()
    assert events["coverage/observation_variance"][1][-1] == pytest.approx(pixels.item(), rel=1e-4)
    assert events["coverage/distinct"][1][-1] == pytest.approx(len(rows.flatten(1).unique(dim=0)) / 32)


@pytest.mark.slow
def test_a_run_ends_after_its_own_steps_and_goes_on_to_more(tmp_path):
    """The step size falls as over the longer schedule, before a stop and after it."""
    settings = SMALL | {"anneal_over": 320, "run_dir": tmp_path}
    for steps in (64, 96):  # each in a process of its own, as the first keeps the folder's lock
        words = [
            f"--{name.replace('_', '-')}={value}" for name, value in (settings | {"total_timesteps": steps}).items()
        ]
        subprocess.run([sys.executable, deep_spi_ppo_atari_coverage.__file__, *words], check=True, capture_output=True)
        done, rates = read_events(tmp_path)["charts/learning_rate"]
        evaluate.main(
            evaluate.Args(tmp_path, episodes=1, policy="sampled", max_length=5)
        )  # with the copy in the folder
        assert done[-1] == steps and rates == pytest.approx([2.5e-4 * (1 - i / 10) for i in range(steps // 32)])


def test_a_schedule_shorter_than_the_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        deep_spi_ppo_atari_coverage.Args(total_timesteps=4096, anneal_over=2048)
    assert "--anneal-over" in capsys.readouterr().err


def test_share_of_distinct():
    assert share_of_distinct(torch.tensor([[1, 2], [1, 2], [2, 1], [0, 0]])) == 0.75
