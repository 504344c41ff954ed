"""evaluate.py on runs that are finished, interrupted, damaged, or made by a copy of a script."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
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

ROOT = Path(__file__).parent.parent
SMALL = {"num_envs": 4, "num_steps": 8, "total_timesteps": 64, "chunk_length": 8, "num_minibatches": 2}
SMALL |= {"device": "cpu", "precision": "fp32", "seed": 3}


def trained(script, run_dir: Path, **settings) -> Path:
    """The folder of a short run."""
    known = {field.name for field in fields(script.Args)}
    script.train(script.Args(run_dir=str(run_dir), **{k: v for k, v in (SMALL | settings).items() if k in known}))
    return run_dir


def evaluated(run_dir: Path, **settings) -> list[tuple[str, float, int, int]]:
    """The rows of evaluation.csv after evaluating the run."""
    evaluate.main(evaluate.Args(run_dir, **settings))
    with open(run_dir / "evaluation.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["policy", "return", "length", "ended"]
    return [(policy, float(value), int(length), int(ended)) for policy, value, length, ended in rows]


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    """Those of a CartPole agent that nobody has trained, but large enough to prefer some action."""
    torch.manual_seed(seed)
    weights = deep_spi_ppo.Agent(4, 2).state_dict()
    return {name: 100 * value if name.startswith("actor") else value for name, value in weights.items()}


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """A finished CartPole run."""
    return trained(deep_spi_ppo, tmp_path_factory.mktemp("cartpole") / "run", env_id="CartPole-v1")


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
    """Played again, one game at a time, with nothing but the simulator."""
    args = deep_spi_ppo.Args(env_id="CartPole-v1", seed=11, num_envs=3, num_minibatches=1, device="cpu")
    agent = deep_spi_ppo.Agent(4, 2)
    agent.load_state_dict(torch.load(cartpole / "agent.pt", weights_only=True))
    lengths = []
    for i in range(3):
        envs = deep_spi_ppo.Games(args).envs
        obs, length, over = envs.reset()[0], 0, False
        while not over:
            with torch.no_grad():
                log_probs, _ = agent.policy_and_value(agent.encode(torch.from_numpy(obs).float()))
            obs, _, terminated, truncated, _ = envs.step(log_probs.argmax(-1).numpy().astype(np.int32))
            length, over = length + 1, terminated[i] | truncated[i]
        lengths.append(length)
    assert [length for _, _, length, _ in evaluated(cartpole, episodes=3, seed=11)[:3]] == lengths


def test_video_shows_the_game_and_a_line_below_it(cartpole):
    rows = evaluated(cartpole, episodes=2, video=True)
    assert rows == evaluated(cartpole, episodes=2)  # the pictures change nothing
    for policy, first in (("greedy", rows[0]), ("sampled", rows[2])):
        with Image.open(cartpole / f"{policy}.gif") as video:
            assert video.n_frames > 0.5 * first[2]  # GIF merges frames that are alike
            width, height = video.size
            assert width == 600 and height > 400
            strip = np.asarray(video.convert("L"))[400:]
        assert strip.max() > 128 and (strip > 128).mean() < 0.2  # text on black


def test_line_below_a_picture_has_value_and_predicted_reward(cartpole, monkeypatch):
    captions = []
    monkeypatch.setattr(evaluate.Film, "take", lambda self, games, caption: captions.append(caption))
    monkeypatch.setattr(evaluate.Film, "save", lambda *_: None)
    (row,) = evaluated(cartpole, episodes=1, policy="greedy", video=True)
    assert len(captions) == row[2] and all(caption.startswith("V ") and "R̄ " in caption for caption in captions)


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v3", "Catch-v0"])
def test_an_environment_without_pictures_is_evaluated_all_the_same(env_id, tmp_path, capsys):
    run_dir = trained(deep_spi_ppo, tmp_path / "run", env_id=env_id)
    capsys.readouterr()
    assert len(evaluated(run_dir, episodes=2, video=True, max_length=50)) == 4
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "pictures" in line]
    assert env_id in line and not list(run_dir.glob("*.gif"))


@pytest.mark.parametrize("script", [deep_spi_ppo_atari, deepmdp_ppo_atari, ppo_baseline], ids=lambda s: s.__name__)
def test_atari_runs(script, tmp_path):
    """Episodes are cut where the limit says."""
    run_dir = trained(script, tmp_path / "run", total_timesteps=32)
    rows = evaluated(run_dir, episodes=2, max_length=30, video=script is ppo_baseline)
    assert [(length, ended) for _, _, length, ended in rows] == [(30, 0)] * 4
    if script is ppo_baseline:
        with Image.open(run_dir / "greedy.gif") as video:
            assert video.width == 160 and video.height > 210 and 1 < video.n_frames <= 31


def test_games_that_end_untold_are_counted(tmp_path):
    """RoadRunner with LEFT held: games end in the no-ops that follow a lost life, where the simulator says nothing.

    By the simulator's own flags alone, the first episodes would be longer.
    """
    run_dir = trained(ppo_baseline, tmp_path / "run", env_id="RoadRunner-v5", total_timesteps=32)
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    for name, value in state["agent"].items():
        if name.startswith("actor"):
            value.zero_()
    state["agent"]["actor.bias"][4] = 100  # LEFT
    torch.save(state, run_dir / "checkpoint.pt")
    rows = evaluated(run_dir, episodes=8, policy="greedy", max_length=3000)
    args = ppo_baseline.Args(env_id="RoadRunner-v5", num_envs=8, device="cpu", seed=1_000_000)
    torch.manual_seed(args.seed)
    envs = ppo_baseline.Games(args).envs
    envs.reset()
    told, lengths, lives, dummy = {}, np.zeros(8, dtype=int), np.zeros(8), np.zeros(8, dtype=bool)
    untold = set()
    while len(told) < 8:
        _, _, terminated, truncated, info = envs.step(np.full(8, 4, dtype=np.int32))
        lengths += ~dummy
        for i in np.flatnonzero(dummy & (info["lives"] > lives)):
            if i not in told and lengths[i] > 1:
                untold.add(int(i))
        for i in np.flatnonzero(info["terminated"].astype(bool) | truncated):
            told.setdefault(int(i), int(lengths[i]))
        dummy, lives = terminated | truncated, info["lives"].copy()
    assert untold  # or this test would show nothing
    assert all(rows[i][2] < told[i] for i in untold)
    assert all(rows[i][2] == told[i] for i in set(told) - untold)


def test_interrupted_run(monkeypatch, tmp_path, capsys):
    run_dir, calls, compute_gae = tmp_path / "run", [], deep_spi_ppo.compute_gae

    def interrupting(*given):
        calls.append(given)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_gae(*given)

    with monkeypatch.context() as patch:
        patch.setattr(deep_spi_ppo, "compute_gae", interrupting)
        with pytest.raises(SystemExit) as stopped:
            trained(deep_spi_ppo, run_dir, total_timesteps=320)
    assert stopped.value.code == 75 and not (run_dir / "agent.pt").exists()
    assert len(evaluated(run_dir, episodes=2)) == 4
    content = (run_dir / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    for damaged in (content[:-1], content[: len(content) // 2], b"", bytes(100)):
        (run_dir / "checkpoint.pt").write_bytes(damaged)
        line = refused(capsys, run_dir)
        assert "damaged" in line and "checkpoint.pt" in line
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (run_dir / "checkpoint.pt").write_bytes(flipped)
    assert "damaged" in refused(capsys, run_dir)


@pytest.mark.parametrize("newest", ["agent.pt", "checkpoint.pt"])
def test_weights_are_the_checkpoints_whatever_the_files_times(cartpole, tmp_path, newest):
    """A longer run, interrupted, has the newer weights in checkpoint.pt, also after a copy that sets other times."""
    run_dir = tmp_path / "run"
    shutil.copytree(cartpole, run_dir)
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    torch.save(state | {"agent": weights_of(1)}, run_dir / "checkpoint.pt")
    torch.save(weights_of(2), run_dir / "agent.pt")
    for name in ("agent.pt", "checkpoint.pt"):
        os.utime(run_dir / name, (2e9, 2e9) if name == newest else (1e9, 1e9))
    for name, value in evaluate.load_weights(run_dir).items():
        assert torch.equal(value, weights_of(1)[name]), name


def test_the_runs_own_copy_of_the_script_plays(tmp_path):
    """A user's own version, with another network, that is changed or gone after the run."""
    source = Path(deep_spi_ppo.__file__).read_text()
    assert source.count("nn.Tanh()") >= 2
    original = tmp_path / "my_agent.py"
    original.write_text(source.replace("nn.Tanh()", "nn.SiLU()"))
    run_dir = trained(evaluate.load_script(original, tmp_path), tmp_path / "run")
    rows = evaluated(run_dir, episodes=2)
    original.write_text("raise RuntimeError('I have moved on')")
    assert evaluated(run_dir, episodes=2) == rows
    original.unlink()
    assert evaluated(run_dir, episodes=2) == rows
    (run_dir / "my_agent.py").rename(tmp_path / "moved.py")
    with pytest.raises(SystemExit) as stopped:
        evaluated(run_dir, episodes=2)
    assert stopped.value.code == 2
    assert evaluated(run_dir, episodes=2, script=tmp_path / "moved.py") == rows


def test_a_module_beside_the_original_is_found(tmp_path):
    """The copy in the run's folder imports a helper that lies where the script lay."""
    source = Path(deep_spi_ppo.__file__).read_text()
    assert source.count("import envpool\n") == 1
    (tmp_path / "my_helper_of_a_test.py").write_text("import envpool\n")
    (tmp_path / "mine.py").write_text(source.replace("import envpool\n", "from my_helper_of_a_test import envpool\n"))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if hasattr(deep_spi_ppo.Args, name)]
    command = [sys.executable, tmp_path / "mine.py", "--env-id=CartPole-v1", f"--run-dir={tmp_path / 'run'}", *flags]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    command = [sys.executable, ROOT / "evaluate.py", tmp_path / "run", "--episodes=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (tmp_path / "my_helper_of_a_test.py").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "my_helper_of_a_test" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_path_among_the_settings_is_a_path_again(cartpole):
    script = evaluate.load_script(Path(deep_spi_ppo.__file__), ROOT)
    args_class = evaluate.dataclasses.make_dataclass(
        "Args", [("data", Path, Path("a")), ("sizes", tuple[int, ...], (1,)), ("other", str, "b")], bases=(script.Args,)
    )
    script.Args = args_class
    config = json.loads((cartpole / "config.json").read_text())
    config["args"] |= {"data": "/some/where", "sizes": [3, 4], "other": "/else"}
    args = evaluate.settings_of(script, config, 7, 2)
    assert (args.data, args.sizes, args.other) == (Path("/some/where"), (3, 4), "/else")
    assert (args.seed, args.num_envs) == (7, 2)


def test_help_and_results_are_printed_in_any_locale(cartpole):
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for flags, text in ((["--help"], "R̄(s, a)"), ([str(cartpole), "--episodes=1"], "greedy: mean return")):
        command = [sys.executable, str(ROOT / "evaluate.py"), *flags]
        done = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert text in " ".join(done.stdout.decode().split())


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
    config = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(config.replace("CartPole-v1", "Acrobot-v1"))
    assert "not its agent's" in refused(capsys, run_dir)
    (run_dir / "config.json").write_text(config)
    (run_dir / "checkpoint.pt").unlink()
    content = (run_dir / "agent.pt").read_bytes()
    (run_dir / "agent.pt").write_bytes(content[: len(content) // 2])
    assert "agent.pt" in refused(capsys, run_dir)
    for text in ("", "{}", "[]"):
        (run_dir / "config.json").write_text(text)
        assert "config.json" in refused(capsys, run_dir)
