"""Each bad input through the command line: one clear line with the flag, the value and the rule; exit code 2."""

import importlib
import importlib.util
import math
import runpy
import sys
from dataclasses import fields
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from tests.launch import ROOT, launch_all

VECTOR, ATARI, BASELINE, DEEPMDP = "deep_spi_ppo.py", "deep_spi_ppo_atari.py", "ppo_baseline.py", "deepmdp_ppo_atari.py"
SCRIPTS = (VECTOR, ATARI, BASELINE, DEEPMDP)
CASES = {  # script, flags, what the one line must contain
    "zero environments": (VECTOR, "--num-envs 0", ["--num-envs", "0", "at least 1"]),
    "negative steps": (VECTOR, "--num-steps -8", ["--num-steps", "-8", "at least 1"]),
    "zero minibatches": (VECTOR, "--num-minibatches 0", ["--num-minibatches", "0", "at least 1"]),
    "zero epochs": (VECTOR, "--update-epochs 0", ["--update-epochs", "0", "at least 1"]),
    "zero chunk": (VECTOR, "--chunk-length 0", ["--chunk-length", "0", "at least 1"]),
    "no checkpoints": (VECTOR, "--checkpoint-interval 0", ["--checkpoint-interval", "0", "at least 1"]),
    "negative budget": (VECTOR, "--total-timesteps -1", ["--total-timesteps", "-1", "at least 1"]),
    "budget under a rollout": (ATARI, "--total-timesteps 1023", ["--total-timesteps", "1023", "one rollout, 1024"]),
    "steps not whole chunks": (ATARI, "--chunk-length 3", ["--chunk-length", "3", "must divide", "8"]),
    "chunks not whole minibatches": (ATARI, "--num-minibatches 3", ["--num-minibatches", "3", "must divide", "128"]),
    "unknown game": (ATARI, "--env-id Pongg-v5", ["--env-id", "Pongg-v5", "Pong-v5"]),
    "unknown environment": (VECTOR, "--env-id CartPole-v9", ["--env-id", "CartPole-v9", "CartPole-v1"]),
    "nothing like it": (VECTOR, "--env-id ???", ["--env-id", "???", "no such environment"]),
    "continuous actions": (VECTOR, "--env-id Pendulum-v1", ["--env-id", "Pendulum-v1", "must be discrete"]),
    "frames for the vector script": (VECTOR, "--env-id Pong-v5", ["--env-id", "Pong-v5", "deep_spi_ppo_atari.py"]),
    "vectors for the Atari script": (ATARI, "--env-id CartPole-v1", ["--env-id", "CartPole-v1", "an Atari game"]),
    "integers in an array": (VECTOR, "--env-id Blackjack-v1", ["--env-id", "Blackjack-v1", "array of floats"]),
    "a library that is not there": (VECTOR, "--env-id CoinrunEasy-v0", ["--env-id", "CoinrunEasy-v0"]),
    "a file that is not there": (VECTOR, "--env-id VizdoomCustom-v1", ["--env-id", "VizdoomCustom-v1"]),
    "stickiness over 1": (VECTOR, "--sticky 1.5", ["--sticky", "1.5", "[0, 1]"]),
    "negative repeat": (ATARI, "--repeat-action-probability -0.1", ["--repeat-action-probability", "-0.1", "least 0"]),
    "repeat over 1": (ATARI, "--repeat-action-probability 1.1", ["--repeat-action-probability", "1.1", "[0, 1]"]),
    "discount over 1": (VECTOR, "--gamma 1.01", ["--gamma", "1.01", "[0, 1]"]),
    "lambda not a number": (VECTOR, "--gae-lambda nan", ["--gae-lambda", "nan", "finite"]),
    "no no-ops": (ATARI, "--noop-max 0", ["--noop-max", "0", "at least 1"]),
    "no-ops for ever": (ATARI, "--noop-max 10001", ["--noop-max", "10001", "at most 10,000"]),
    "no step size": (VECTOR, "--learning-rate 0", ["--learning-rate", "0.0", "positive"]),
    "no gradient": (VECTOR, "--max-grad-norm 0", ["--max-grad-norm", "0.0", "positive"]),
    "negative coefficient": (VECTOR, "--transition-loss-coef -1", ["--transition-loss-coef", "-1.0", "at least 0"]),
    "infinite coefficient": (VECTOR, "--reward-loss-coef inf", ["--reward-loss-coef", "inf", "finite"]),
    "negative entropy": (BASELINE, "--ent-coef -0.01", ["--ent-coef", "-0.01", "at least 0"]),
    "no neighbourhood": (VECTOR, "--clip-coef 1", ["--clip-coef", "1.0", "1 < C < 2"]),
    "no clip": (BASELINE, "--clip-coef 0", ["--clip-coef", "0.0", "1 < C < 2"]),
    "negative seed": (VECTOR, "--seed -1", ["--seed", "-1"]),
    "huge seed": (VECTOR, "--seed 9223372036854775808", ["--seed", "9223372036854775808", "2^63"]),
    "a file in the way": (VECTOR, "--run-dir FILE", ["--run-dir", "file", "cannot be used"]),
    "a file above": (VECTOR, "--run-dir FILE/run", ["--run-dir", "file/run", "cannot be used"]),
    "a name too long": (VECTOR, f"--run-dir {'x' * 300}", ["--run-dir", "cannot be used"]),
    "a damaged run": (VECTOR, "--run-dir TAKEN", ["--run-dir", "taken", "damaged"]),
    "baseline checks too": (BASELINE, "--num-minibatches 5", ["--num-minibatches", "5", "must divide"]),
    "baseline names games": (BASELINE, "--env-id Boxin-v5", ["--env-id", "Boxin-v5", "Boxing-v5"]),
    "negative penalty": (DEEPMDP, "--gradient-penalty-coef -1", ["--gradient-penalty-coef", "-1.0", "at least 0"]),
    "W&B without wandb": (VECTOR, "--track", ["--track", "pip install wandb"]),
    "a mere folder of its name": (ATARI, "--track", ["--track", "pip install wandb"]),
    "CUDA asked for and absent": (VECTOR, "--device cuda", ["--device", "cuda", "no CUDA"]),
}  # fmt: skip
OF_THIS_MACHINE = {  # what another machine may have: only where it is absent can a shell show that
    "W&B without wandb": importlib.util.find_spec("wandb") is None,
    "a mere folder of its name": False,
    "CUDA asked for and absent": not torch.cuda.is_available(),
}
# Not of the flag's type, or no flag: tyro says so in a box.
NO_FLAGS = {
    **{flag: (script, flag) for script in SCRIPTS[:2] for flag in ("--num-envs x", "--gamma", "--no-flag", "word")},
    **{flag: (VECTOR, flag) for flag in ("--loss-placement beside", "--precision fp16", "--device tpu", "--seed 1.5")},
    **{flag: (VECTOR, flag) for flag in ("--runs-dir x", "--run-name x", "--resume", "--compile")},
    "--spectral-norm published": (VECTOR, "--spectral-norm published"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for runs in which one name is taken, by no run of these scripts; beside it a file that is in the way."""
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "checkpoint.pt").write_text("of something else")
    (tmp_path / "runs" / "taken" / "episodes.csv").touch()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(key: str, folder: Path) -> tuple[str, list[str]]:
    """Script and flags of a case."""
    script, flags, _ = CASES[key]
    flags = flags.replace("FILE", str(folder / "file")).replace("TAKEN", str(folder / "runs" / "taken")).split()
    flags = [*flags, "--device", "cpu"] if "--device" not in flags else flags
    return script, flags if "--run-dir" in flags else [*flags, "--run-dir", str(folder / "runs" / "new")]


def assert_refused(key: str, code: int, stdout: str, stderr: str) -> None:
    assert code == 2, stderr
    assert stdout == ""
    assert len(stderr.splitlines()) == 1 and stderr.startswith("error: --"), stderr
    for words in CASES[key][2]:
        assert words in stderr


def assert_nothing_made(folder: Path) -> None:
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert paths == {"file", "runs", "runs/taken", "runs/taken/checkpoint.pt", "runs/taken/episodes.csv"}
    assert (folder / "runs" / "taken" / "episodes.csv").read_bytes() == b""


def run_as_main(script: str, flags: list[str], monkeypatch) -> int | str:
    """The exit code of the script, run as __main__ in this process, which has torch and EnvPool loaded already."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return refused.value.code


@pytest.mark.parametrize("key", CASES)
def test_bad_input_is_refused_in_one_line(key, folder, monkeypatch, capfd):
    script, flags = command(key, folder)
    find_spec = importlib.util.find_spec
    wandb = None if key == "W&B without wandb" else ModuleSpec("wandb", None)  # such as W&B's output folder is found as
    monkeypatch.setattr("importlib.util.find_spec", lambda name: wandb if name == "wandb" else find_spec(name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if "--run-dir" not in CASES[key][1]:  # there the flag itself is met after the check of the environment
        monkeypatch.setattr("envpool.make", lambda *_, **__: pytest.fail("an environment was built"))
    code = run_as_main(script, flags, monkeypatch)
    assert_refused(key, code, *capfd.readouterr())
    assert_nothing_made(folder)


@pytest.mark.parametrize("key", NO_FLAGS)
def test_what_is_no_setting_is_refused(key, folder, monkeypatch, capfd):
    script, flags = NO_FLAGS[key]
    code = run_as_main(script, [*flags.split(), "--run-dir", "new"], monkeypatch)
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and err.startswith("╭─ ") and "Traceback" not in err
    assert_nothing_made(folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_its_bounds(script, capfd):
    """Whatever the field: not NaN, not infinite, not negative; and sizes are not 0."""
    Args = importlib.import_module(script.removesuffix(".py")).Args
    numbers = [field for field in fields(Args) if field.type in (int, float)]
    assert len(numbers) >= 17
    for field in numbers:
        bad = [-1, -(10**30), *([0] if field.type is int and field.name != "seed" else [])]
        bad += [math.nan, math.inf, -math.inf, -1e-300] if field.type is float else []
        for value in bad:
            with pytest.raises(SystemExit) as refused:
                Args(**{field.name: value, "device": "cpu"})
            out, err = capfd.readouterr()
            flag = field.name.replace("_", "-")
            assert refused.value.code == 2 and out == "" and len(err.splitlines()) == 1
            assert err.startswith(f"error: --{flag}: got {value}; must "), err


@pytest.mark.slow
def test_bad_input_from_a_shell(folder):
    """Every case again as a user meets it: a process of its own, whose libraries may print what they like on stderr."""
    cases = [key for key in CASES if OF_THIS_MACHINE.get(key, True)]
    for key, done in launch_all({key: command(key, folder) for key in cases}).items():
        assert_refused(key, done.returncode, done.stdout, done.stderr)
    assert_nothing_made(folder)


TRAINING_SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if "class Games" in path.read_text()]


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_a_whole_number_for_a_float_is_the_float(script):
    """As Python has it: Args(ent_coef=0) is Args(ent_coef=0.0), and may be 0."""
    module = importlib.import_module(script)
    assert module.Args(ent_coef=0, gae_lambda=0, max_grad_norm=1).ent_coef == 0
    with pytest.raises(SystemExit):
        module.Args(num_envs=0)
