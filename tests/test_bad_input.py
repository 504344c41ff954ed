"""Each bad input through the real command line: one clear line with the flag, the value and the rule; exit code 2."""

import pytest
import torch

from tests.launch import launch_all

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
    "W&B without wandb": (VECTOR, "--track", ["--track", "pip install wandb"]),
    "existing folder": (VECTOR, "--run-name taken", ["--run-name", "taken", "exists"]),
    "unwritable folder": (VECTOR, "--runs-dir FILE", ["--runs-dir", "file", "cannot make"]),
    "baseline checks too": ("ppo_baseline.py", "--num-minibatches 5", ["--num-minibatches", "5", "must divide"]),
    "baseline names games": ("ppo_baseline.py", "--env-id Boxin-v5", ["--env-id", "Boxin-v5", "Boxing-v5"]),
    "negative penalty": ("deepmdp_ppo_atari.py", "--gradient-penalty-coef -1", ["--gradient-penalty-coef", "-1.0"]),
}  # fmt: skip
if not torch.cuda.is_available():
    CASES["CUDA asked for and absent"] = (VECTOR, "--device cuda", ["--device", "cuda", "no CUDA"])


@pytest.fixture(scope="session")
def refusals(tmp_path_factory):
    """What each command did, and the folder in which it could have made something."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "runs" / "taken").mkdir(parents=True)
    (folder / "file").write_text("in the way")
    commands = {}
    for key, (script, flags, _) in CASES.items():
        flags = flags.replace("FILE", str(folder / "file")).split()
        commands[key] = (script, flags if "--runs-dir" in flags else [*flags, "--runs-dir", str(folder / "runs")])
    return launch_all(commands), folder


@pytest.mark.parametrize("key", CASES)
def test_bad_input_is_refused_in_one_line(refusals, key):
    done = refusals[0][key]
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for words in CASES[key][2]:
        assert words in done.stderr


def test_a_refused_run_leaves_nothing(refusals):
    folder = refusals[1]
    assert [path.name for path in (folder / "runs").iterdir()] == ["taken"]
    assert not list((folder / "runs" / "taken").iterdir())
