"""benchmark/peers/sb3_ppo.py: the peer trains, leaves what the scripts leave, and its policy can be evaluated."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable_baselines3 is not installed: requirements-benchmark.txt has it")

import evaluate
from benchmark.common import read_events
from benchmark.peers import sb3_ppo, sb3_ppo_continuous


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Two rollouts of eight Pong games."""
    folder = tmp_path_factory.mktemp("sb3")
    shape = {"num_envs": 8, "num_steps": 8, "total_timesteps": 130}
    sb3_ppo.train(sb3_ppo.Args(device="cpu", run_dir=str(folder / "run"), **shape))
    return folder / "run"


def test_a_run_leaves_what_the_launcher_looks_for(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    assert config["script"] == "sb3_ppo.py" and config["versions"]["stable_baselines3"]
    steps, sps = read_events(run_dir)["charts/SPS"]
    assert steps[-1] == 128 and sps[-1] > 0
    assert (run_dir / "episodes.csv").read_text().startswith("global_step,return,length\n")


def test_agent_is_sb3s_policy(run_dir):
    agent = sb3_ppo.Agent(num_actions=6)
    agent.load_state_dict(torch.load(run_dir / "agent.pt", weights_only=True))
    frames = torch.randint(0, 256, (5, 84, 84, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_probs, values = agent.policy_and_value(agent.encode(frames))
        as_sb3_has_them = frames.permute(0, 3, 1, 2)
        distribution = agent.get_distribution(as_sb3_has_them).distribution
        np.testing.assert_allclose(log_probs, distribution.logits, atol=1e-5)
        np.testing.assert_allclose(values, agent.predict_values(as_sb3_has_them).squeeze(-1), atol=1e-5)
    assert values.shape == (5,) and log_probs.exp().sum(-1).numpy() == pytest.approx(1.0)


def test_its_policy_can_be_evaluated(run_dir):
    evaluate.main(evaluate.Args(run_dir, episodes=2, policy="sampled", max_length=30))
    with open(run_dir / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["policy"] for row in rows] == ["sampled"] * 2 and [row["length"] for row in rows] == ["30"] * 2


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"chunk_length": 8}, {"track": True}])
def test_what_sb3_has_no_equal_of_is_refused(settings, capsys):
    with pytest.raises(SystemExit) as refused:
        sb3_ppo.Args(**settings)
    assert refused.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    (name,) = settings
    assert line.startswith(f"error: --{name.replace('_', '-')}: ")


def test_the_continuous_peer_trains_and_sees_true_returns(tmp_path):
    run_dir = tmp_path / "run"
    args = sb3_ppo_continuous.Args(
        env_id="Pendulum-v1", num_envs=4, num_steps=256, total_timesteps=2048, device="cpu", run_dir=str(run_dir)
    )
    sb3_ppo_continuous.train(args)
    config = json.loads((run_dir / "config.json").read_text())
    assert config["script"] == "sb3_ppo_continuous.py" and config["versions"]["stable_baselines3"]
    assert read_events(run_dir)["charts/SPS"][0][-1] == 2048 and (run_dir / "agent.pt").is_file()
    episodes = np.loadtxt(run_dir / "episodes.csv", delimiter=",", skiprows=1)
    assert len(episodes) == 8 and (episodes[:, 2] == 200).all() and (episodes[:, 1] < -500).all()  # not normalised


@pytest.mark.parametrize("settings", [{"reward_loss_coef": 0.01}, {"transition_loss_coef": 1.0}, {"track": True}])
def test_the_continuous_peer_refuses_what_sb3_lacks(settings, capsys):
    with pytest.raises(SystemExit) as refused:
        sb3_ppo_continuous.Args(**settings)
    assert refused.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "SB3" in line
