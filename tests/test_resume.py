"""Runs that survive signals, kills, full disks and damaged checkpoints; a resumed run is what it would have been."""

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import deep_spi_ppo
import deep_spi_ppo_atari
import deepmdp_ppo_atari
import ppo_baseline
from benchmark.collect import read_events
from tests.conftest import STOP_SIGNALS
from tests.kill_and_resume import check_run, kill_and_resume
from tests.launch import ROOT

SCRIPTS = (deep_spi_ppo, deep_spi_ppo_atari, deepmdp_ppo_atari, ppo_baseline)
ids = lambda script: script.__name__  # noqa: E731


@pytest.fixture(autouse=True)
def one_thread():
    """On which the bits depend."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_args(script, folder: Path, name: str = "run", iterations: int = 6, **settings):
    """Small settings. For the baseline, games that end within them; the others' updates take longer."""
    sizes = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "env_id": "Boxing-v5"}
    if script is ppo_baseline:
        sizes |= {"num_steps": 400, "env_id": "SpaceInvaders-v5"}
    if script is deep_spi_ppo:
        sizes = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "update_epochs": 1, "sticky": 0.3}
    steps = iterations * sizes["num_envs"] * sizes["num_steps"]
    sizes |= {"total_timesteps": steps, "device": "cpu", "precision": "fp32"}
    args = script.Args(runs_dir=str(folder), run_name=name, seed=3, **sizes)
    return replace(args, **settings)


def at_call(monkeypatch, script, function: str, number: int, action: Callable) -> None:
    """Do something when the script calls one of its functions for the number-th time, from 1."""
    original, calls = getattr(script, function), []

    def wrapper(*inputs):
        calls.append(None)
        if len(calls) == number:
            action()
        return original(*inputs)

    monkeypatch.setattr(script, function, wrapper)


def stop(script, args) -> int:
    """Run until it ends early; its exit code."""
    with pytest.raises(SystemExit) as ended:
        script.train(args)
    return ended.value.code


def checkpoint_of(script, args) -> dict:
    """The run's checkpoint, loaded as these arguments would resume it."""
    run = script.describe_run(args, torch.device("cpu"), "fp32")
    return script.load_checkpoint(Path(args.runs_dir) / args.run_name, run)


def weights(folder: Path, name: str = "run") -> dict[str, torch.Tensor]:
    return torch.load(folder / name / "agent.pt", weights_only=True)


# ---- Resuming


class Rebuilt:
    """Environments that can be replaced by those a resumed run would get."""

    def __init__(self, make_envs, args):
        self.make_envs, self.args, self.envs = make_envs, args, make_envs(args, 0)

    def rebuild(self):
        self.envs = self.make_envs(self.args, 1)

    def reset(self):
        return self.envs.reset()

    def step(self, actions):
        return self.envs.step(actions)


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_resumed_run_equals_the_uninterrupted_one(script, monkeypatch, tmp_path):
    """To the last bit, if that one also starts new environments at the checkpoint: what a resume cannot keep.

    There the uninterrupted run's own variables are given a new start, from within the call that writes the checkpoint.
    """
    interrupted = small_args(script, tmp_path, "interrupted")
    with monkeypatch.context() as patch:
        at_call(patch, script, "compute_gae", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stop(script, interrupted) == 75
    time.sleep(1.1)  # TensorBoard orders a run's files by the second
    script.train(replace(interrupted, resume=True))

    whole = small_args(script, tmp_path, "whole", checkpoint_interval=3)
    made, make_envs, write_whole = [], script.make_envs, script.write_whole

    def make_rebuilt(args, _):
        made.append(Rebuilt(make_envs, args))
        return made[0]

    def write_and_start_anew(path, content):
        write_whole(path, content)
        if path.name != "checkpoint.pt":
            return
        own = sys._getframe(1).f_locals  # of train
        made[0].rebuild()
        first = made[0].reset()[0]
        if script is deep_spi_ppo:
            first = script.vectorize(first, 4)
            own["dummy"][:], own["executed"][:] = True, 0
            own["reward_scaler"].discounted.zero_()
        else:
            first = first.transpose(0, 2, 3, 1)
        own["obs"][-1] = torch.from_numpy(first)
        own["dones"][-1], own["done"][:] = False, False
        own["episodic_return"][:], own["episodic_length"][:] = 0, 0

    monkeypatch.setattr(script, "make_envs", make_rebuilt)
    monkeypatch.setattr(script, "write_whole", write_and_start_anew)
    script.train(whole)
    ours, theirs = weights(tmp_path, "interrupted"), weights(tmp_path, "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    texts = [(tmp_path / name / "episodes.csv").read_text() for name in ("interrupted", "whole")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) > {deep_spi_ppo: 10, ppo_baseline: 3}.get(script, 0)
    check_run(tmp_path / "interrupted")
    for tag, (steps, values) in read_events(tmp_path / "whole").items():
        resumed_steps, resumed_values = read_events(tmp_path / "interrupted")[tag]
        np.testing.assert_array_equal(resumed_steps, steps)
        if tag != "charts/SPS":
            np.testing.assert_array_equal(resumed_values, values)
    (resume,) = json.loads((tmp_path / "interrupted" / "config.json").read_text())["resumes"]
    assert resume["global_step"] == whole.total_timesteps // 2


def test_each_resume_has_environments_of_its_own():
    for script in SCRIPTS:
        streams = [script.env_seeds(7, 128, resumes) for resumes in range(4)]
        assert streams[0] == script.env_seeds(7, 128)
        assert len({seed for stream in streams for seed in stream}) == 4 * 128
        assert all(0 <= seed < 2**31 for stream in streams for seed in stream)


def test_a_finished_run_is_left_alone_or_made_longer(tmp_path, capsys):
    args = small_args(deep_spi_ppo, tmp_path)
    deep_spi_ppo.train(args)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    deep_spi_ppo.train(replace(args, resume=True))
    assert "complete" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    time.sleep(1.1)
    deep_spi_ppo.train(replace(args, resume=True, total_timesteps=2 * args.total_timesteps))
    check_run(tmp_path / "run")


# ---- Signals


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["setup", "rollout", "update", "checkpoint"])
def test_signal_stops_the_run_after_its_iteration(moment, number, monkeypatch, tmp_path, capsys):
    script, send = deep_spi_ppo, lambda: os.kill(os.getpid(), number)
    args = small_args(script, tmp_path, checkpoint_interval=2)
    function, call = {
        "setup": ("make_envs", 1),
        "rollout": ("vectorize", 80),  # of 1 at the start and 32 in each rollout
        "update": ("compute_loss", 6),  # of 2 in each iteration
        "checkpoint": ("write_whole", 2),  # of config.json, then checkpoint.pt after 2 iterations
    }[moment]
    with monkeypatch.context() as patch:
        at_call(patch, script, function, call, send)
        assert stop(script, args) == 75
    captured = capsys.readouterr()
    assert f"stopped by {number.name}" in captured.err and captured.err.rstrip().endswith("--resume")
    iterations = checkpoint_of(script, args)["iterations"]
    assert iterations == {"setup": 1, "rollout": 3, "update": 3, "checkpoint": 3}[moment]
    time.sleep(1.1)
    script.train(replace(args, resume=True))
    check_run(tmp_path / "run")


def test_second_signal_ends_at_once():
    """As it would without the first: here by the signal itself."""
    code = "import deep_spi_ppo, os, signal, time; deep_spi_ppo.catch_signals()\n"
    code += "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == -signal.SIGTERM


# ---- Checkpoints that cannot be resumed


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    """A finished small run, and its checkpoint's content."""
    folder = tmp_path_factory.mktemp("checkpointed")
    args = small_args(deep_spi_ppo, folder, iterations=2)
    deep_spi_ppo.train(args)
    longer = replace(args, resume=True, total_timesteps=10 * args.total_timesteps)
    return folder / "run", longer, (folder / "run" / "checkpoint.pt").read_bytes()


def assert_refused(run_dir: Path, args, content: bytes, capsys, *words: str) -> None:
    """One line on stderr that has the words, exit code 2, and the file as it was."""
    (run_dir / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit) as refused:
        checkpoint_of(deep_spi_ppo, args)
    captured = capsys.readouterr()
    assert refused.value.code == 2
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1, captured
    for word in words:
        assert word in captured.err
    assert (run_dir / "checkpoint.pt").read_bytes() == content


def test_truncated_checkpoints_are_refused(checkpointed, capsys):
    """Every length of the last kilobyte, and none at all."""
    run_dir, args, content = checkpointed
    for length in (0, 1, 31, 32, 33, *range(len(content) - 1024, len(content))):
        assert_refused(run_dir, args, content[:length], capsys, "damaged")


def test_flipped_bits_are_refused(checkpointed, capsys):
    run_dir, args, content = checkpointed
    for bit in np.random.default_rng(0).integers(8 * len(content), size=200):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        assert_refused(run_dir, args, bytes(flipped), capsys, "damaged")


def test_foreign_checkpoints_are_refused(checkpointed, capsys):
    run_dir, args, content = checkpointed
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, buffer)
    assert_refused(run_dir, args, buffer.getvalue(), capsys, "not a checkpoint")
    state = torch.load(io.BytesIO(content[32:]), weights_only=True)
    state["run"]["script"] = "deep_spi_ppo_atari.py"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    foreign = hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()
    assert_refused(run_dir, args, foreign, capsys, "deep_spi_ppo_atari.py")


def test_changed_arguments_are_named(checkpointed, capsys):
    run_dir, args, content = checkpointed
    changed = replace(args, learning_rate=1e-3, seed=4, total_timesteps=10**6, checkpoint_interval=7)
    words = ("--learning-rate was 0.002 and is 0.001", "--seed was 3 and is 4")
    assert_refused(run_dir, changed, content, capsys, *words)
    (run_dir / "checkpoint.pt").write_bytes(content)
    assert checkpoint_of(deep_spi_ppo, replace(args, checkpoint_interval=7))["iterations"] == 2
    run = deep_spi_ppo.describe_run(args, torch.device("cpu"), "bf16")  # as --precision auto may be on another machine
    with pytest.raises(SystemExit):
        deep_spi_ppo.load_checkpoint(run_dir, run)
    assert "precision was 'fp32' and is 'bf16'" in capsys.readouterr().err


def test_lost_episodes_are_noticed(checkpointed, capsys):
    """Rather than papered over, when the file is cut back to where it was at the checkpoint."""
    run_dir, args, content = checkpointed
    path = run_dir / "episodes.csv"
    text = path.read_text()
    path.write_text(text[:-1])
    assert_refused(run_dir, args, content, capsys, "episodes.csv", "lacks episodes")
    path.unlink()
    assert_refused(run_dir, args, content, capsys, "episodes.csv", "lacks episodes")
    path.write_text(text)


def test_there_is_nothing_to_resume(tmp_path, capsys):
    assert stop(deep_spi_ppo, small_args(deep_spi_ppo, tmp_path, resume=True)) == 2
    assert "no checkpoint.pt" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert stop(deep_spi_ppo, small_args(deep_spi_ppo, tmp_path, resume=True, run_name=None)) == 2
    assert "--run-name" in capsys.readouterr().err


# ---- Faults while training


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root on Linux can mount a small disk")
@pytest.mark.parametrize("script", ["deep_spi_ppo", "ppo_baseline"])
def test_full_disk_stops_the_run_and_keeps_the_checkpoint(script, tmp_path):
    """A disk with room for one checkpoint and not for the next beside it."""
    flags = "--num-envs 4 --num-steps 32 --total-timesteps 12800 --seed 3 --device cpu --checkpoint-interval 1"
    flags += " --num-minibatches 1 --update-epochs 1"
    trial = [sys.executable, str(ROOT / f"{script}.py"), *flags.split(), "--run-name", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    once = [*trial, "--runs-dir", str(tmp_path / "trial"), "--total-timesteps", "128"]
    subprocess.run(once, env=environment, check=True, capture_output=True, timeout=300)
    size = int(1.5 * (tmp_path / "trial" / "run" / "checkpoint.pt").stat().st_size)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)])
    if mounted.returncode != 0:
        pytest.skip("this root may not mount a small disk")
    try:
        command = [*trial, "--runs-dir", str(disk)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert "No space left on device" in line and "Traceback" not in done.stderr
        content = (disk / "run" / "checkpoint.pt").read_bytes()
        assert hashlib.sha256(content[32:]).digest() == content[:32]
        assert not (disk / "run" / "checkpoint.pt.tmp").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's, raised again here
def test_folder_that_vanishes_stops_the_run_with_its_cause(monkeypatch, tmp_path):
    args = small_args(deep_spi_ppo, tmp_path, checkpoint_interval=2)
    at_call(monkeypatch, deep_spi_ppo, "compute_gae", 3, lambda: (tmp_path / "run").rename(tmp_path / "elsewhere"))
    with pytest.raises(OSError, match="/run/"):  # TensorBoard's file, or the checkpoint
        deep_spi_ppo.train(args)
    assert checkpoint_of(deep_spi_ppo, replace(args, run_name="elsewhere"))["iterations"] == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_parameters_that_are_not_finite_stop_the_run_in_the_same_iteration(script, monkeypatch, tmp_path, capsys):
    """Spoilt by the iteration's last step, which no loss has seen."""
    args, steps, adam_step = small_args(script, tmp_path, checkpoint_interval=1), [], torch.optim.Adam.step

    def spoiling_step(optimizer):
        adam_step(optimizer)
        steps.append(None)
        if len(steps) == 4:  # of 2 in each iteration
            with torch.no_grad():
                optimizer.param_groups[0]["params"][-1].fill_(torch.nan)  # the critic's bias

    monkeypatch.setattr(torch.optim.Adam, "step", spoiling_step)
    assert stop(script, args) == 1
    error = capsys.readouterr().err
    assert f"stopped at step {args.total_timesteps // 3}: not finite: critic.bias" in error
    state = checkpoint_of(script, args)
    assert state["iterations"] == 1 and all(tensor.isfinite().all() for tensor in state["agent"].values())
    monkeypatch.setattr(torch.optim.Adam, "step", adam_step)
    time.sleep(1.1)
    script.train(replace(args, resume=True))
    check_run(tmp_path / "run")


def test_weights_that_are_too_large_are_not_kept(tmp_path, capsys):
    """Finite, but not the policy they give: that shows before they are written."""
    args = small_args(deep_spi_ppo_atari, tmp_path, learning_rate=1e30, num_minibatches=1, checkpoint_interval=1)
    assert stop(deep_spi_ppo_atari, args) == 1
    assert "not finite: log_probs" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# ---- Kills


@pytest.mark.slow
@pytest.mark.parametrize("script", ["deep_spi_ppo", "deep_spi_ppo_atari", "ppo_baseline"])
def test_killed_at_random_and_resumed(script, tmp_path):
    """Ten kills over the three scripts; `python -m tests.kill_and_resume` does more."""
    kills = {"deep_spi_ppo": 4, "deep_spi_ppo_atari": 3, "ppo_baseline": 3}[script]
    assert kill_and_resume(script, kills, tmp_path, seed=1) >= 1


def test_check_run_finds_what_is_wrong(checkpointed):
    """The check that the kills are judged by is one that can fail."""
    run_dir, _, _ = checkpointed
    check_run(run_dir)
    path = run_dir / "episodes.csv"
    text = path.read_text()
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow((1, 10.0, 10))  # a step that was before
    with pytest.raises(AssertionError):
        check_run(run_dir)
    path.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_random_command_lines(script):
    """Twenty-five; `python -m tests.fuzz_command_line` does five hundred. In a process that has not used torch yet."""
    command = [sys.executable, "-m", "tests.fuzz_command_line", script.__name__, "--examples", "25"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
