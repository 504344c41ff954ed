"""The trained agents in pretrained/: they load, they play as well as is stated, and their folders are clean."""

import json
import shutil

import numpy as np
import pytest
import torch

import deep_spi_ppo
import evaluate
from benchmark.common import RESULTS, read_table
from benchmark.studies.pretrained import FOLDER, GAMES, SCORES, returns, table
from benchmark.suites import CONTROL_STEPS

EPISODES = 16
AGENTS = pytest.mark.parametrize("env_id", CONTROL_STEPS)


def played(run_dir) -> np.ndarray:
    """Returns (EPISODES,) of the sampled policy in games that neither the run nor the stated score has seen."""
    evaluate.main(evaluate.Args(run=run_dir, episodes=EPISODES, policy="sampled", seed=77))
    return np.array([float(row["return"]) for row in read_table(run_dir / "evaluation.csv")])


@AGENTS
def test_the_agent_plays_as_stated_and_an_untrained_one_does_not(env_id, tmp_path):
    stated = returns(env_id, "sampled")
    # Four standard errors of the difference, and 1 % for a spread of 0.
    allowed = 4 * stated.std(ddof=1) * (1 / EPISODES + 1 / GAMES) ** 0.5 + 0.01 * abs(stated.mean())
    run_dir = shutil.copytree(FOLDER / env_id, tmp_path / "run")
    assert abs(played(run_dir).mean() - stated.mean()) <= allowed
    games = deep_spi_ppo.Games(deep_spi_ppo.Args(env_id=env_id))
    torch.manual_seed(0)
    torch.save(deep_spi_ppo.Agent(games.num_inputs, games.num_actions).state_dict(), run_dir / "agent.pt")
    assert played(run_dir).mean() < stated.mean() - allowed


@AGENTS
def test_the_folder_is_that_of_a_run_of_suite_control_without_the_machines_paths(env_id):
    text = (FOLDER / env_id / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config["script"] == "deep_spi_ppo.py" and len(config["git_commit"]) == 40 and "script_path" not in config
    assert (config["args"]["env_id"], config["args"]["seed"], config["args"]["run_dir"]) == (env_id, 1, "")
    assert config["args"]["total_timesteps"] == CONTROL_STEPS[env_id]
    defaults = vars(deep_spi_ppo.Args(device="cpu", env_id=env_id, total_timesteps=CONTROL_STEPS[env_id]))
    assert config["args"] == defaults
    assert (FOLDER / env_id / "agent.pt").stat().st_size < 1e6
    last = int(read_table(FOLDER / env_id / "episodes.csv")[-1]["global_step"])
    assert CONTROL_STEPS[env_id] - 4096 * 2 < last <= CONTROL_STEPS[env_id]


def test_scores_have_every_game_and_the_readme_states_them():
    rows = read_table(SCORES)
    assert len(rows) == 2 * GAMES * len(CONTROL_STEPS)
    for env_id in CONTROL_STEPS:
        assert len(returns(env_id, "greedy")) == len(returns(env_id, "sampled")) == GAMES
    assert table() in (FOLDER.parent / "README.md").read_text(encoding="utf-8")


def test_the_gif_is_small():
    assert (RESULTS / "lunar_lander.gif").stat().st_size < 1e6
