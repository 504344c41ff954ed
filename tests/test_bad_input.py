"""Each bad input through the command line: one clear line with the flag, the value and the rule; exit code 2."""

import importlib.util
import runpy
import sys

import pytest
import torch

from tests.launch import ROOT, launch_all

VECTOR, ATARI = "deep_spi_ppo.py", "deep_spi_ppo_atari.py"
CASES = {  # script, flags, what the one line must contain
    "zero environments": (VECTOR, "--num-envs 0", ["--num-envs", "0", "at least 1"]),
    "negative steps": (VECTOR, "--num-steps -8", ["--num-steps", "-8", "at least 1"]),
    "zero minibatches": (VECTOR, "--num-minibatches 0", ["--num-minibatches", "0", "at least 1"]),
    "zero epochs": (VECTOR, "--update-epochs 0", ["--update-epochs", "0", "at least 1"]),
    "zero chunk": (VECTOR, "--chunk-length 0", ["--chunk-length", "0", "at least 1"]),
    "negative budget": (VECTOR, "--total-timesteps -1", ["--total-timesteps", "-1", "at least one rollout"]),
    "budget under a rollout": (ATARI, "--total-timesteps 1023", ["--total-timesteps", "1023", "1024"]),
    "steps not whole chunks": (ATARI, "--chunk-length 3", ["--chunk-length", "3", "must divide", "8"]),
    "chunks not whole minibatches": (ATARI, "--num-minibatches 3", ["--num-minibatches", "3", "must divide", "128"]),
    "unknown game": (ATARI, "--env-id Pongg-v5", ["--env-id", "Pongg-v5", "Pong-v5"]),
    "unknown environment": (VECTOR, "--env-id CartPole-v9", ["--env-id", "CartPole-v9", "CartPole-v1"]),
    "nothing like it": (VECTOR, "--env-id ???", ["--env-id", "???", "no such environment"]),
    "continuous actions": (VECTOR, "--env-id Pendulum-v1", ["--env-id", "Pendulum-v1", "must be discrete"]),
    "frames for the vector script": (VECTOR, "--env-id Pong-v5", ["--env-id", "Pong-v5", "deep_spi_ppo_atari.py"]),
    "vectors for the Atari script": (ATARI, "--env-id CartPole-v1", ["--env-id", "CartPole-v1", "deep_spi_ppo.py"]),
    "integers in an array": (VECTOR, "--env-id Blackjack-v1", ["--env-id", "Blackjack-v1", "array of floats"]),
    "stickiness over 1": (VECTOR, "--sticky 1.5", ["--sticky", "1.5", "[0, 1]"]),
    "negative repeat": (ATARI, "--repeat-action-probability -0.1", ["--repeat-action-probability", "-0.1", "[0, 1]"]),
    "discount over 1": (VECTOR, "--gamma 1.01", ["--gamma", "1.01", "[0, 1]"]),
    "lambda not a number": (VECTOR, "--gae-lambda nan", ["--gae-lambda", "nan", "[0, 1]"]),
    "no no-ops": (ATARI, "--noop-max 0", ["--noop-max", "0", "at least 1"]),
    "no step size": (VECTOR, "--learning-rate 0", ["--learning-rate", "0.0", "positive"]),
    "negative coefficient": (VECTOR, "--transition-loss-coef -1", ["--transition-loss-coef", "-1.0", "not negative"]),
    "infinite coefficient": (VECTOR, "--reward-loss-coef inf", ["--reward-loss-coef", "inf", "finite"]),
    "no neighbourhood": (VECTOR, "--clip-coef 1", ["--clip-coef", "1.0", "1 < C < 2"]),
    "negative seed": (VECTOR, "--seed -1", ["--seed", "-1"]),
    "existing folder": (VECTOR, "--run-name taken", ["--run-name", "taken", "exists"]),
    "unwritable folder": (VECTOR, "--runs-dir FILE", ["--runs-dir", "file", "cannot make"]),
    "baseline checks too": ("ppo_baseline.py", "--num-minibatches 5", ["--num-minibatches", "5", "must divide"]),
    "baseline names games": ("ppo_baseline.py", "--env-id Boxin-v5", ["--env-id", "Boxin-v5", "Boxing-v5"]),
    "negative penalty": ("deepmdp_ppo_atari.py", "--gradient-penalty-coef -1", ["--gradient-penalty-coef", "-1.0"]),
}  # fmt: skip
if importlib.util.find_spec("wandb") is None:
    CASES["W&B without wandb"] = (VECTOR, "--track", ["--track", "pip install wandb"])
if not torch.cuda.is_available():
    CASES["CUDA asked for and absent"] = (VECTOR, "--device cuda", ["--device", "cuda", "no CUDA"])


@pytest.fixture
def folder(tmp_path):
    """A folder for runs in which one name is taken, beside a file that is in the way."""
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "file").write_text("in the way")
    return tmp_path


def command(key, folder):
    """Script and flags of a case."""
    script, flags, _ = CASES[key]
    flags = flags.replace("FILE", str(folder / "file")).split()
    return script, flags if "--runs-dir" in flags else [*flags, "--runs-dir", str(folder / "runs")]


def assert_refused(key, code, stdout, stderr):
    assert code == 2, stderr
    assert stdout == ""
    assert len(stderr.strip().splitlines()) == 1, stderr
    for words in CASES[key][2]:
        assert words in stderr


@pytest.mark.parametrize("key", CASES)
def test_bad_input_is_refused_in_one_line(key, folder, monkeypatch, capsys):
    """The script run as __main__ with these arguments, in this process, which has torch and EnvPool loaded already."""
    script, flags = command(key, folder)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr("envpool.make", lambda *_, **__: pytest.fail("an environment was built"))
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert_refused(key, refused.value.code, *capsys.readouterr())
    assert [path.name for path in (folder / "runs").iterdir()] == ["taken"]
    assert not list((folder / "runs" / "taken").iterdir())


@pytest.mark.slow
def test_bad_input_from_a_shell(folder):
    """Every case again as a user meets it: a process of its own, whose libraries may print what they like on stderr."""
    for key, done in launch_all({key: command(key, folder) for key in CASES}).items():
        assert_refused(key, done.returncode, done.stdout, done.stderr)
