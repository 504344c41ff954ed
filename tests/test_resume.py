"""Runs that survive signals, kills, full disks and damaged checkpoints; one gone on with is what it would have been."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deep_spi_ppo
import deep_spi_ppo_atari
import deepmdp_ppo_atari
import ppo_baseline
from tests import fuzz_command_line
from tests.conftest import STOP_SIGNALS
from tests.kill_and_resume import SMALL, check_run, kill_and_resume
from tests.launch import ROOT, launch

SCRIPTS = (deep_spi_ppo, deep_spi_ppo_atari, deepmdp_ppo_atari, ppo_baseline)
ids = lambda script: script.__name__  # noqa: E731


@pytest.fixture(autouse=True)
def one_thread():
    """On which the bits depend."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_args(script, run_dir: Path, iterations: int = 4, **settings):
    """Small settings. For the baseline, games that end within them; the others' updates take longer."""
    sizes = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "env_id": "Boxing-v5"}
    if script is ppo_baseline:
        sizes |= {"num_steps": 128, "env_id": "Breakout-v5"}
    if script is deep_spi_ppo:
        sizes = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "update_epochs": 1, "sticky": 0.3}
    steps = iterations * sizes["num_envs"] * sizes["num_steps"]
    sizes |= {"total_timesteps": steps, "device": "cpu", "precision": "fp32"}
    return replace(script.Args(run_dir=str(run_dir), seed=3, **sizes), **settings)


def at_call(monkeypatch, owner, function: str, number: int, action: Callable[[], None]) -> None:
    """Do something when one of the owner's functions is called for the number-th time, from 1."""
    original, calls = getattr(owner, function), []

    def wrapper(*inputs, **named):
        calls.append(None)
        if len(calls) == number:
            action()
        return original(*inputs, **named)

    monkeypatch.setattr(owner, function, wrapper)


@contextlib.contextmanager
def as_a_process(script) -> Iterator[None]:
    """What the end of a process does, which each run has for its own: the handlers go, and the lock on its files."""
    runs, handlers = [], {number: signal.getsignal(number) for number in STOP_SIGNALS}

    class Run(script.Run):
        def __init__(self, args):
            runs.append(self)
            super().__init__(args)

    original, script.Run = script.Run, Run
    try:
        yield
    finally:
        script.Run = original
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for run in runs:
            for name in ("episodes", "writer", "bar"):
                if hasattr(run, name):
                    getattr(run, name).close()


def train(script, args) -> None:
    """Start a run, or go on with it."""
    with as_a_process(script):
        script.train(args)


def stop(script, args) -> int:
    """Run until it ends early; its exit code."""
    with pytest.raises(SystemExit) as ended:
        train(script, args)
    return ended.value.code


def checkpoint_of(args) -> dict:
    return torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def equal(first: object, second: object) -> bool:
    """Tensor by tensor, value by value, type by type."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


# ---- Going on


def logged(run_dir: Path) -> tuple[dict[str, list], dict[str, list]]:
    """All scalars and all histograms of a run: tag -> (step, value)."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    histograms = {
        tag: [(event.step, event.histogram_value) for event in events.Histograms(tag)] for tag in tags["histograms"]
    }
    return scalars, histograms


def start_new_games_after(iteration: int, script, monkeypatch) -> None:
    """Let a run start new games after so many iterations: what a run that goes on cannot keep, and nothing else.

    The first observation of a rollout, and whether an episode ended there, are what the rollout before it left: the
    observation that `train` has encoded last before the advantages, and the last row of the calendar that they get.
    """
    kept = {}
    games_class, encode, compute_gae = script.Games, script.Agent.encode, script.compute_gae

    def keep_games(*inputs):
        kept["games"] = games_class(*inputs)
        return kept["games"]

    def keep_obs(agent, obs):
        kept["encoded"] = obs
        return encode(agent, obs)

    def keep_last(rewards, values, is_terminal, is_last, *settings):
        kept["obs"], kept["is_last"] = kept["encoded"], is_last
        return compute_gae(rewards, values, is_terminal, is_last, *settings)

    class Run(script.Run):
        def end_iteration(self, metrics, ratios, learned):
            super().end_iteration(metrics, ratios, learned)
            if self.iterations == iteration:
                vars(kept["games"]).update(vars(games_class(self.args, iteration)))
                kept["obs"].copy_(kept["games"].reset())
                kept["is_last"][-1] = False
                if script is deep_spi_ppo:
                    learned["reward_scaler"].discounted.zero_()

    monkeypatch.setattr(script, "Games", keep_games)
    monkeypatch.setattr(script.Agent, "encode", keep_obs)
    monkeypatch.setattr(script, "compute_gae", keep_last)
    monkeypatch.setattr(script, "Run", Run)


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_interrupted_run_equals_the_uninterrupted_one(script, monkeypatch, tmp_path):
    """To the last bit, if that one also starts new games at the checkpoint."""
    interrupted = small_args(script, tmp_path / "interrupted")
    with monkeypatch.context() as patch:
        at_call(patch, script, "compute_gae", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stop(script, interrupted) == 75
    assert checkpoint_of(interrupted)["iterations"] == 2
    time.sleep(1.1)  # TensorBoard orders a run's files by the second
    train(script, interrupted)

    whole = small_args(script, tmp_path / "whole", checkpoint_interval=2)
    with monkeypatch.context() as patch:
        start_new_games_after(2, script, patch)
        train(script, whole)
    ours, theirs = (torch.load(tmp_path / name / "agent.pt", weights_only=True) for name in ("interrupted", "whole"))
    assert equal(ours, theirs)
    ours, theirs = checkpoint_of(interrupted), checkpoint_of(whole)
    assert ours.keys() == theirs.keys()
    assert all(equal(ours[name], theirs[name]) for name in ours if name not in ("config", "seconds"))
    texts = [(tmp_path / name / "episodes.csv").read_text() for name in ("interrupted", "whole")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) > {deep_spi_ppo: 10, ppo_baseline: 3}.get(script, 0)
    check_run(tmp_path / "interrupted")
    (ours, our_histograms), (theirs, their_histograms) = (logged(tmp_path / name) for name in ("interrupted", "whole"))
    assert ours.pop("charts/SPS") != theirs.pop("charts/SPS")
    assert ours == theirs and our_histograms == their_histograms and len(their_histograms["spi/ratios"]) == 2
    config = json.loads((tmp_path / "interrupted" / "config.json").read_text())
    assert config["resumes"] == [whole.total_timesteps // 2]
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["resumes"] == []


def test_new_games_change_the_run(monkeypatch, tmp_path):
    """So that the test above is one that can fail."""
    train(deep_spi_ppo, small_args(deep_spi_ppo, tmp_path / "same"))
    with monkeypatch.context() as patch:
        start_new_games_after(2, deep_spi_ppo, patch)
        train(deep_spi_ppo, small_args(deep_spi_ppo, tmp_path / "new"))
    episodes = [(tmp_path / name / "episodes.csv").read_text() for name in ("same", "new")]
    half = small_args(deep_spi_ppo, tmp_path).total_timesteps // 2
    first, second = ([line for line in text.splitlines()[1:] if int(line.split(",")[0]) <= half] for text in episodes)
    assert first == second and episodes[0] != episodes[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_each_start_has_games_of_its_own(script, monkeypatch):
    seeds = []

    def make(*_, env_seed, **__):
        seeds.append(env_seed)
        raise InterruptedError

    args = script.Args(device="cpu")
    monkeypatch.setattr(script.envpool, "make", make)
    for start in (0, 1, 2, 300, 0):
        with pytest.raises(InterruptedError):
            script.Games(args, start)
    assert seeds[0] == seeds.pop()
    assert len({seed for stream in seeds for seed in stream}) == 4 * args.num_envs
    assert all(0 <= seed < 2**31 for stream in seeds for seed in stream)


def test_a_finished_run_is_left_alone_or_made_longer(monkeypatch, tmp_path, capsys):
    args = small_args(deep_spi_ppo, tmp_path / "run")
    train(deep_spi_ppo, args)
    before = contents(tmp_path / "run")
    capsys.readouterr()
    for steps in (args.total_timesteps, args.total_timesteps // 2, args.total_timesteps + 4 * 32 - 1):
        assert stop(deep_spi_ppo, replace(args, total_timesteps=steps)) == 0
        captured = capsys.readouterr()
        assert "complete" in captured.out and len(captured.out.splitlines()) == 1 and captured.err == ""
    assert contents(tmp_path / "run") == before
    time.sleep(1.1)
    longer = replace(args, total_timesteps=2 * args.total_timesteps)
    with monkeypatch.context() as patch:  # old weights beside newer ones would be taken for the result
        at_call(patch, deep_spi_ppo, "compute_gae", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stop(deep_spi_ppo, longer) == 75
    assert "agent.pt" not in contents(tmp_path / "run")
    time.sleep(1.1)
    train(deep_spi_ppo, longer)
    check_run(tmp_path / "run")
    assert equal(torch.load(tmp_path / "run" / "agent.pt", weights_only=True), checkpoint_of(args)["agent"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resumes"] == [512, 640]


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_another_text_of_the_script_does_not_go_on(script, monkeypatch, tmp_path, capsys):
    """Half a run of one loss and half of another would be a run of neither; and nothing of the old one is lost."""
    args = small_args(script, tmp_path / "run", iterations=2)
    train(script, args)
    own = tmp_path / "run" / f"{script.__name__}.py"
    own.write_text(own.read_text().replace("return torch.min(ratio", "return torch.max(ratio"))
    before = contents(tmp_path / "run")
    longer = replace(args, total_timesteps=2 * args.total_timesteps)
    capsys.readouterr()
    assert stop(script, longer) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert str(tmp_path / "run") in captured.err and f"another version of {own.name}: run the copy" in captured.err
    assert contents(tmp_path / "run") == before
    own.write_bytes(Path(script.__file__).read_bytes())
    train(script, longer)


def test_a_folder_without_a_checkpoint_is_a_new_run(monkeypatch, tmp_path):
    """As where a run was killed before its first checkpoint: nothing of it stays in the tables."""
    args = small_args(deep_spi_ppo, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch, deep_spi_ppo, "compute_gae", 3, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        train(deep_spi_ppo, args)
    assert "checkpoint.pt" not in contents(tmp_path / "run")
    time.sleep(1.1)
    train(deep_spi_ppo, args)
    train(deep_spi_ppo, small_args(deep_spi_ppo, tmp_path / "again"))
    check_run(tmp_path / "run")
    assert (tmp_path / "run" / "episodes.csv").read_text() == (tmp_path / "again" / "episodes.csv").read_text()


# ---- Signals


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["setup", "rollout", "update", "checkpoint"])
def test_signal_stops_the_run_after_its_iteration(moment, number, monkeypatch, tmp_path, capsys):
    script, send = deep_spi_ppo, lambda: os.kill(os.getpid(), number)
    args = small_args(script, tmp_path / "run", checkpoint_interval=2)
    owner, function, call = {
        "setup": (script, "Games", 1),
        "rollout": (script.Games, "step", 80),  # of 32 in each rollout
        "update": (script, "compute_loss", 6),  # of 2 in each iteration
        "checkpoint": (script.os, "fsync", 1),  # after 2 iterations
    }[moment]
    with monkeypatch.context() as patch:
        at_call(patch, owner, function, call, send)
        assert stop(script, args) == 75
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "stopped" in line]
    assert line.startswith(f"stopped by {number.name}; ") and line.endswith(f" --run-dir {args.run_dir}")
    iterations = checkpoint_of(args)["iterations"]
    assert iterations == {"setup": 1, "rollout": 3, "update": 3, "checkpoint": 2}[moment]
    assert not {"agent.pt", "checkpoint.tmp"} & set(contents(tmp_path / "run"))
    time.sleep(1.1)
    train(script, args)
    check_run(tmp_path / "run")


SIGNALS = """
import os, signal, sys, time
import deep_spi_ppo
number = signal.Signals[sys.argv[2]]
end_iteration = deep_spi_ppo.Run.end_iteration
def interrupted(*inputs):
    for _ in range(int(sys.argv[3])):
        os.kill(os.getpid(), number)
    end_iteration(*inputs)
deep_spi_ppo.Run.end_iteration = interrupted
deep_spi_ppo.train(deep_spi_ppo.Args(run_dir=sys.argv[1], total_timesteps=2 * 512, num_envs=8, device="cpu"))
"""


@pytest.mark.parametrize(
    ("name", "count", "ignored", "code"), [("SIGTERM", 2, False, -15), ("SIGHUP", 1, False, 75), ("SIGHUP", 1, True, 0)]
)
def test_second_signal_ends_at_once_and_what_nohup_ignores_stays_ignored(name, count, ignored, code, tmp_path):
    command = [sys.executable, "-c", SIGNALS, str(tmp_path / "run"), name, str(count)]
    ignore = (lambda: signal.signal(signal.Signals[name], signal.SIG_IGN)) if ignored else None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=ignore)
    assert done.returncode == code, done.stderr
    assert (f"stopped by {name}" in done.stderr) == (code == 75)
    if code == 0:
        check_run(tmp_path / "run")


# ---- Two processes, one folder


def test_a_second_process_is_refused(monkeypatch, tmp_path):
    """A run started twice at once: the second says so in one line and touches nothing; the first goes on unharmed."""
    args = small_args(deep_spi_ppo, tmp_path / "run")
    flags = "--num-envs 4 --num-steps 32 --num-minibatches 2 --update-epochs 1 --sticky 0.3 --seed 3 --device cpu"
    flags += f" --total-timesteps {args.total_timesteps} --run-dir {args.run_dir}"
    done = []

    def second():
        before = contents(tmp_path / "run")
        done.append(launch("deep_spi_ppo.py", flags.split()))
        after = contents(tmp_path / "run")
        assert after.keys() == before.keys()  # TensorBoard's file grows meanwhile: the first writes it now and then
        assert all(after[name] == before[name] for name in before if not name.startswith("events."))

    at_call(monkeypatch, deep_spi_ppo, "compute_gae", 3, second)
    train(deep_spi_ppo, args)
    assert done[0].returncode == 2 and done[0].stdout == ""
    (line,) = done[0].stderr.splitlines()
    assert line.startswith(f"error: --run-dir: got {args.run_dir!r}; ") and "another process" in line
    check_run(tmp_path / "run")
    done = launch("deep_spi_ppo.py", flags.split())  # once the first has ended, its lock is gone
    assert done.returncode == 0 and "complete" in done.stdout


# ---- Checkpoints that cannot be gone on from


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    """A finished small run's folder, arguments that make it longer, and its checkpoint's content."""
    folder = tmp_path_factory.mktemp("checkpointed")
    args = small_args(deep_spi_ppo, folder / "run", iterations=2)
    train(deep_spi_ppo, args)
    longer = replace(args, total_timesteps=10 * args.total_timesteps)
    return folder / "run", longer, (folder / "run" / "checkpoint.pt").read_bytes()


@pytest.fixture
def unwritten(monkeypatch):
    """Runs that are opened and have nothing to do with Git, TensorBoard and the weights, many times a second."""

    class Nothing:
        def __getattr__(self, _):
            return lambda *_, **__: self

        stdout = ""

    monkeypatch.setattr(deep_spi_ppo, "subprocess", Nothing())
    monkeypatch.setattr(deep_spi_ppo, "SummaryWriter", lambda *_, **__: Nothing())
    monkeypatch.setattr(deep_spi_ppo, "tqdm", lambda *_, **__: Nothing())


def opened(args, content: bytes) -> dict | None:
    """The state that a run with this checkpoint goes on from, or None if it is refused. The file stays as it is."""
    path = Path(args.run_dir) / "checkpoint.pt"
    path.write_bytes(content)
    run, code = deep_spi_ppo.Run.__new__(deep_spi_ppo.Run), 0
    try:
        run.__init__(args)
    except SystemExit as refused:
        code = refused.code
    finally:
        run.episodes.close()
    assert path.read_bytes() == content
    assert code in (0, 2)
    return None if code else run.state


def assert_refused(args, content: bytes, capsys, *words: str) -> None:
    """One line on stderr that has the words, exit code 2, and the folder as it was."""
    run_dir = Path(args.run_dir)
    before = contents(run_dir) | {"checkpoint.pt": content}
    assert opened(args, content) is None
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1, captured
    assert captured.err.startswith(f"error: --run-dir: got {args.run_dir!r}; ")
    for word in words:
        assert word in captured.err
    assert contents(run_dir) == before


def assert_refused_or_harmless(args, damaged: Iterator[bytes], original: dict, capsys) -> tuple[int, int]:
    """How many of the damaged checkpoints were refused, and how many gave the original's state. Never another."""
    refused = harmless = 0
    for content in damaged:
        state = opened(args, content)
        captured = capsys.readouterr()
        if state is None:
            refused += 1
            assert captured.out == "" and len(captured.err.splitlines()) == 1 and "damaged" in captured.err, captured
        else:
            harmless += 1
            assert equal(state, original)
    return refused, harmless


def flipped(content: bytes, bits: list[int]) -> Iterator[bytes]:
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def test_checkpoint_is_readable_by_plain_torch(checkpointed):
    run_dir, _, content = checkpointed
    state = torch.load(io.BytesIO(content), weights_only=True)
    assert equal(state["agent"], torch.load(run_dir / "agent.pt", weights_only=True))
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    assert state["config"] == json.loads((run_dir / "config.json").read_text())


def test_truncated_checkpoints_are_refused(checkpointed, unwritten, capsys):
    """Every length of the last kilobyte, and none at all."""
    _, args, content = checkpointed
    original = torch.load(io.BytesIO(content), weights_only=True)
    lengths = (0, 1, 31, 32, 33, len(content) // 2, *range(len(content) - 1024, len(content)))
    damaged = (content[:length] for length in lengths)
    assert assert_refused_or_harmless(args, damaged, original, capsys) == (len(lengths), 0)


def test_flipped_bits_are_refused_or_harmless(checkpointed, unwritten, capsys):
    """Anywhere; and where no check sum looks: in the zip's own names, sizes and directory."""
    _, args, content = checkpointed
    original = torch.load(io.BytesIO(content), weights_only=True)
    rng = np.random.default_rng(0)
    anywhere = rng.integers(8 * len(content), size=1000).tolist()
    refused, harmless = assert_refused_or_harmless(args, flipped(content, anywhere), original, capsys)
    assert refused + harmless == 1000 and refused > 800
    in_a_file = np.zeros(len(content), dtype=bool)
    for entry in zipfile.ZipFile(io.BytesIO(content)).infolist():
        start = content.index(entry.filename.encode(), entry.header_offset) + len(entry.filename)
        in_a_file[start + 64 : start + entry.file_size] = True  # from 64 on: padding may lie before
    outside = rng.choice(np.flatnonzero(~in_a_file), 500) * 8 + rng.integers(8, size=500)
    refused, harmless = assert_refused_or_harmless(args, flipped(content, outside.tolist()), original, capsys)
    assert refused > 0 and harmless > 0


def test_foreign_checkpoints_are_refused(checkpointed, unwritten, capsys):
    _, args, content = checkpointed
    state = torch.load(io.BytesIO(content), weights_only=True)

    def saved(content) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    assert equal(opened(args, saved(state)), state)
    for foreign in ({"weights": torch.zeros(3)}, [1], state["agent"], {**state, "config": 1}):
        assert_refused(args, saved(foreign), capsys, "damaged")
    for missing in ("config", "iterations", "episodes_bytes"):  # `train` asks for the others
        assert_refused(args, saved({k: v for k, v in state.items() if k != missing}), capsys, "damaged")
    for missing in ("args", "script", "id", "resumes"):
        config = {k: v for k, v in state["config"].items() if k != missing}
        assert_refused(args, saved({**state, "config": config}), capsys, "damaged")
    assert_refused(args, bytes(32) + content, capsys, "damaged")  # a digest stood there in another version
    assert_refused(args, b"no zip at all", capsys, "damaged")
    other = {**state, "config": {**state["config"], "script": "deep_spi_ppo_atari.py"}}
    assert_refused(args, saved(other), capsys, "deep_spi_ppo_atari.py")


def test_changed_arguments_are_named(checkpointed, unwritten, capsys):
    _, args, content = checkpointed
    changed = replace(args, learning_rate=1e-3, seed=4, precision="bf16", total_timesteps=10**6, checkpoint_interval=7)
    words = ("--learning-rate 0.002, not 0.001", "--seed 3, not 4", "--precision fp32, not bf16")
    assert_refused(changed, content, capsys, *words)
    for name in vars(args):  # every single one, but for the four that may change
        value = getattr(args, name)
        other = {
            "device": "cuda",
            "loss_placement": "gated",
            "env_id": "Acrobot-v1",
            "run_dir": args.run_dir,
            "precision": "bf16",
        }.get(name, not value if isinstance(value, bool) else value)
        if not isinstance(value, str | bool):
            other = value * 2 if value else 0.5
        changed = replace(args)  # unchecked: "cuda" and "track" may be none of this machine's
        setattr(changed, name, other)
        if name in ("total_timesteps", "checkpoint_interval", "run_dir"):
            assert opened(changed, content)["iterations"] == 2
        elif name != "track":
            assert_refused(changed, content, capsys, f"--{name.replace('_', '-')} {value}, not {other}")


def test_lost_episodes_are_noticed(checkpointed, unwritten, capsys):
    """Rather than papered over, when the file is cut back to where it was at the checkpoint."""
    run_dir, args, content = checkpointed
    path = run_dir / "episodes.csv"
    text = path.read_text()
    path.write_text(text[:-1])
    assert_refused(args, content, capsys, "episodes.csv")
    path.write_text("")
    assert_refused(args, content, capsys, "episodes.csv")
    path.unlink()
    assert opened(args, content) is None
    path.write_text(text + "1,2.0,3\n")
    assert opened(args, content)["iterations"] == 2  # what came after the checkpoint is made again
    assert path.read_text() == text


# ---- Faults while training


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of so many bytes at the folder."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root on Linux can mount a small disk, and not everywhere")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("script", ["deep_spi_ppo", "ppo_baseline"])
def test_full_disk_stops_the_run_and_keeps_the_checkpoint(script, tmp_path):
    """A disk with room for one checkpoint and not for the next beside it; then one that the final weights fill."""
    flags = "--num-envs 4 --num-steps 32 --seed 3 --device cpu --precision fp32 --checkpoint-interval 1"
    flags = [*flags.split(), "--num-minibatches", "1", "--update-epochs", "1", "--total-timesteps"]
    done = launch(f"{script}.py", [*flags, "128", "--run-dir", str(tmp_path / "trial")])
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "trial" / "checkpoint.pt").stat().st_size
    for steps, room in ((12800, int(1.5 * size)), (128, int(0.3 * size))):
        with small_disk(tmp_path / f"disk{steps}", room) as disk:
            done = launch(f"{script}.py", [*flags, str(steps), "--run-dir", str(disk / "run")])
            assert done.returncode == 1, done.stderr
            (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            assert line.startswith("error:") and "No space left on device" in line and "Traceback" not in done.stderr
            left = contents(disk / "run")
            assert not {"agent.pt", "checkpoint.tmp"} & set(left)
            assert (disk / "run" / f"{script}.py").read_bytes() == (ROOT / f"{script}.py").read_bytes()
            if steps == 12800:
                assert zipfile.ZipFile(disk / "run" / "checkpoint.pt").testzip() is None
                assert torch.load(disk / "run" / "checkpoint.pt", weights_only=True)["iterations"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's, raised again here
def test_folder_that_vanishes_stops_the_run_with_its_cause(monkeypatch, tmp_path):
    args = small_args(deep_spi_ppo, tmp_path / "run", checkpoint_interval=2)
    at_call(monkeypatch, deep_spi_ppo, "compute_gae", 3, lambda: (tmp_path / "run").rename(tmp_path / "elsewhere"))
    with pytest.raises(OSError, match="/run/"):  # TensorBoard's file, or the checkpoint
        train(deep_spi_ppo, args)
    assert checkpoint_of(replace(args, run_dir=str(tmp_path / "elsewhere")))["iterations"] == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_parameters_that_are_not_finite_stop_the_run_in_the_same_iteration(script, monkeypatch, tmp_path):
    """Spoilt by the iteration's last step, which no loss has seen."""
    args, steps, adam_step = small_args(script, tmp_path / "run", checkpoint_interval=1), [], torch.optim.Adam.step

    def spoiling_step(optimizer):
        adam_step(optimizer)
        steps.append(None)
        if len(steps) == 4:  # of 2 in each iteration
            with torch.no_grad():
                optimizer.param_groups[0]["params"][-1].fill_(torch.nan)  # the critic's bias, or the world model's

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", spoiling_step)
        step = args.total_timesteps // 2
        terms = (
            rf"losses/[a-z_]+, at step {step}|world_model/[a-z_]+, at step {step}|log_probs or value, after the update"
        )
        with pytest.raises(FloatingPointError, match=f"^not finite: ({terms})$"):
            train(script, args)
    state = checkpoint_of(args)
    assert state["iterations"] == 1 and all(tensor.isfinite().all() for tensor in state["agent"].values())
    assert not {"agent.pt", "checkpoint.tmp"} & set(contents(tmp_path / "run"))
    time.sleep(1.1)
    train(script, args)
    check_run(tmp_path / "run")


def test_not_finite_from_a_shell(tmp_path):
    """One line that names the term, exit code 1."""
    flags = "--learning-rate 1e30 --num-envs 4 --num-steps 32 --total-timesteps 256 --device cpu --num-minibatches 1"
    done = launch("deep_spi_ppo.py", [*flags.split(), "--run-dir", str(tmp_path / "run")])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith("error: not finite: ")
    assert not {"agent.pt", "checkpoint.pt"} & set(contents(tmp_path / "run"))


@pytest.mark.parametrize("learning_rate", [1e6, 1e10, 1e15, 1e30])
@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_weights_that_are_too_large_are_not_kept(script, learning_rate, tmp_path):
    """Finite, but not the policy they give: that shows before they are written."""
    settings = {"learning_rate": learning_rate, "num_minibatches": 1, "checkpoint_interval": 1, "num_steps": 8}
    args = small_args(script, tmp_path / "run", iterations=20, **settings, chunk_length=1)
    args.total_timesteps = 20 * args.num_envs * args.num_steps
    with contextlib.suppress(FloatingPointError):
        train(script, args)
    if (tmp_path / "run" / "checkpoint.pt").exists():
        state = checkpoint_of(args)
        games = script.Games(args)
        sizes = (games.num_inputs, games.num_actions) if script is deep_spi_ppo else (games.num_actions,)
        agent = script.Agent(*sizes)
        agent.load_state_dict(state["agent"])
        with torch.no_grad():
            log_probs, values = agent.policy_and_value(agent.encode(games.reset()))
        assert log_probs.isfinite().all() and values.isfinite().all()


# ---- Kills


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_killed_at_random_and_gone_on_with(script, tmp_path):
    """Some kills of each script; `python -m tests.kill_and_resume` does more."""
    kills = {"deep_spi_ppo": 3, "deep_spi_ppo_atari": 3}.get(script, 2)
    assert kill_and_resume(script, kills, tmp_path, seed=1) >= 1


def test_check_run_finds_what_is_wrong(tmp_path):
    """The check that the kills are judged by is one that can fail."""
    run_dir = tmp_path / "run"
    train(deep_spi_ppo, small_args(deep_spi_ppo, run_dir, iterations=2))
    check_run(run_dir)
    path = run_dir / "episodes.csv"
    text = path.read_text()
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow((1, 10.0, 10))  # a step that was before
    with pytest.raises(AssertionError):
        check_run(run_dir)
    path.write_text(text)
    check_run(run_dir)
    path = run_dir / "deep_spi_ppo.py"
    path.write_text(path.read_text() + "\n")  # not the code that ran
    with pytest.raises(AssertionError):
        check_run(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("script", fuzz_command_line.SCRIPTS)
def test_random_command_lines(script):
    """Twenty-five; `python -m tests.fuzz_command_line` does five hundred. In a process that has not used torch yet."""
    command = [sys.executable, "-m", "tests.fuzz_command_line", script, "--examples", "25"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
