"""evaluate.py on runs that are finished, interrupted, damaged, or made by a copy of a script."""

import csv
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deep_spi_ppo
import deep_spi_ppo_atari
import deepmdp_ppo_atari
import evaluate
import ppo_baseline
from tests.test_resume import at_call, small_args, stop


def evaluated(run_dir: Path, **settings) -> list[tuple[str, float, int, int]]:
    """The rows of evaluation.csv after evaluating the run."""
    evaluate.main(evaluate.Args(run_dir, **settings))
    with open(run_dir / "evaluation.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["policy", "return", "length", "ended"]
    return [(policy, float(value), int(length), int(ended)) for policy, value, length, ended in rows]


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """A finished CartPole run."""
    folder = tmp_path_factory.mktemp("cartpole")
    deep_spi_ppo.train(small_args(deep_spi_ppo, folder, sticky=0.0))
    return folder / "run"


def test_each_policy_plays_its_episodes(cartpole, capsys):
    rows = evaluated(cartpole, episodes=5)
    assert [row[0] for row in rows] == ["greedy"] * 5 + ["sampled"] * 5
    assert all(value == length and ended for _, value, length, ended in rows)  # CartPole pays 1 a step
    assert len({length for *_, length, _ in rows}) > 2  # different games
    printed = capsys.readouterr().out
    assert f"greedy: mean return {np.mean([row[1] for row in rows[:5]]):.2f}" in printed
    assert evaluated(cartpole, episodes=5) == rows != evaluated(cartpole, episodes=5, seed=5)
    for policy, own in (("greedy", rows[:5]), ("sampled", rows[5:])):
        assert evaluated(cartpole, episodes=5, policy=policy) == own


def test_episodes_are_what_the_agent_does(cartpole):
    """Played again with the environment's own loop, one game at a time."""
    args = small_args(deep_spi_ppo, cartpole.parent, sticky=0.0, num_envs=3, seed=11)
    agent = deep_spi_ppo.Agent(4, 2, "exact", torch.Generator())
    agent.load_state_dict(torch.load(cartpole / "agent.pt", weights_only=True))
    lengths = []
    for i in range(3):
        envs = deep_spi_ppo.make_envs(args)
        obs, length, over = envs.reset()[0], 0, False
        while not over:
            with torch.no_grad():
                log_probs, _ = agent.policy_and_value(agent.encode(torch.from_numpy(obs)))
            obs, _, terminated, truncated, _ = envs.step(log_probs.argmax(-1).numpy().astype(np.int32))
            length, over = length + 1, terminated[i] | truncated[i]
        lengths.append(length)
    assert [length for _, _, length, _ in evaluated(cartpole, episodes=3, seed=11)[:3]] == lengths


def test_video_shows_the_game(cartpole):
    rows = evaluated(cartpole, episodes=2, video=True)
    for policy, first in (("greedy", rows[0]), ("sampled", rows[2])):
        with Image.open(cartpole / f"{policy}.gif") as video:
            assert video.n_frames > 0.5 * first[2]  # GIF merges frames that are alike
            assert video.size[0] > video.size[1] > 100


@pytest.mark.parametrize("script", [deep_spi_ppo_atari, deepmdp_ppo_atari, ppo_baseline], ids=lambda s: s.__name__)
def test_atari_runs(script, tmp_path):
    """Episodes are cut where the limit says."""
    script.train(small_args(script, tmp_path, iterations=1))
    rows = evaluated(tmp_path / "run", episodes=2, max_length=30, video=script is ppo_baseline)
    assert [(length, ended) for _, _, length, ended in rows] == [(30, 0)] * 4
    if script is ppo_baseline:
        with Image.open(tmp_path / "run" / "greedy.gif") as video:
            assert video.size == (160, 210) and 1 < video.n_frames <= 31


def test_interrupted_run(monkeypatch, tmp_path, capsys):
    args = small_args(deep_spi_ppo, tmp_path)
    with monkeypatch.context() as patch:
        at_call(patch, deep_spi_ppo, "compute_gae", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stop(deep_spi_ppo, args) == 75
    assert not (tmp_path / "run" / "agent.pt").exists()
    assert len(evaluated(tmp_path / "run", episodes=2)) == 4
    content = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(content[:-1])
    with pytest.raises(SystemExit) as refused:
        evaluated(tmp_path / "run")
    assert refused.value.code == 2 and "damaged" in capsys.readouterr().err


def test_copied_script(tmp_path, capsys):
    """A user's own version, with another network, at another place; and after it has moved on."""
    source = Path(deep_spi_ppo.__file__).read_text()
    assert source.count("nn.Tanh()") == 2
    (tmp_path / "my_agent.py").write_text(source.replace("nn.Tanh()", "nn.SiLU()"))
    mine = evaluate.load_script(tmp_path / "my_agent.py")
    mine.train(small_args(deep_spi_ppo, tmp_path))
    rows = evaluated(tmp_path / "run", episodes=2)
    shutil.move(tmp_path / "my_agent.py", tmp_path / "moved.py")
    with pytest.raises(SystemExit) as refused:
        evaluated(tmp_path / "run", episodes=2)
    assert refused.value.code == 2 and "--script" in capsys.readouterr().err
    assert evaluated(tmp_path / "run", episodes=2, script=tmp_path / "moved.py") == rows


def damage_weights(run_dir):
    content = (run_dir / "agent.pt").read_bytes()
    (run_dir / "agent.pt").write_bytes(content[: len(content) // 2])


def refused(capsys, run_dir: Path, **settings) -> str:
    """The one line with which it refuses."""
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(evaluate.Args(run_dir, **settings))
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert stopped.value.code == 2 and captured.out == ""
    return line


def test_bad_input(cartpole, tmp_path, capsys):
    for name, value in (("episodes", 0), ("max_length", 0), ("seed", -1), ("seed", 2**63)):
        assert f"--{name.replace('_', '-')}" in refused(capsys, cartpole, **{name: value})
    assert "config.json" in refused(capsys, tmp_path)
    assert "--script" in refused(capsys, cartpole, script=Path(__file__).parent / "golden" / "README.md")
    run_dir = tmp_path / "copy"
    shutil.copytree(cartpole, run_dir)
    damage_weights(run_dir)
    assert "agent.pt" in refused(capsys, run_dir)
    for content in ("", "{}", "[]"):
        (run_dir / "config.json").write_text(content)
        assert "config.json" in refused(capsys, run_dir)
