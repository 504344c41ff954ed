"""Each script end to end at small size, in a process of its own, on real environments."""

import csv
import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deep_spi_ppo
import deep_spi_ppo_atari
from tests.launch import ROOT, launch_all

SMALL = ["--num-envs", "4", "--num-steps", "8", "--total-timesteps", "128", "--seed", "3"]  # 4 iterations of 16 updates
VECTOR = ["--num-envs", "8", "--num-steps", "32", "--total-timesteps", "2048", "--seed", "3"]
ZERO = ["--reward-loss-coef", "0", "--transition-loss-coef", "0"]
DEEP_SPI, BASELINE, DEEPMDP = "deep_spi_ppo_atari.py", "ppo_baseline.py", "deepmdp_ppo_atari.py"
COMMANDS = {
    "baseline": (BASELINE, SMALL),
    "deep_spi": (DEEP_SPI, SMALL),
    "deep_spi again": (DEEP_SPI, SMALL),
    "deep_spi at 0": (DEEP_SPI, [*SMALL, *ZERO]),
    "deep_spi additive": (DEEP_SPI, [*SMALL, "--loss-placement", "additive"]),
    "deep_spi published": (DEEP_SPI, [*SMALL, "--spectral-norm", "published"]),
    "deep_spi bf16": (DEEP_SPI, [*SMALL, "--precision", "bf16", "--chunk-length", "1"]),
    "deepmdp": (DEEPMDP, SMALL),
    "not finite": (DEEP_SPI, [*SMALL, "--learning-rate", "1e30"]),
    "vector": ("deep_spi_ppo.py", VECTOR),
    "vector again": ("deep_spi_ppo.py", VECTOR),
    "vector sticky": ("deep_spi_ppo.py", [*VECTOR, "--sticky", "0.5"]),
    "vector at 0": ("deep_spi_ppo.py", [*VECTOR, *ZERO]),
    **{
        env_id: ("deep_spi_ppo.py", [*VECTOR, "--env-id", env_id])
        for env_id in ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v3", "Catch-v0", "Acrobot-v1", "LunarLander-v3")
    },
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Every command above, run; its folder is runs/<key>."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, launch_all(
        {
            key: (script, [*flags, "--runs-dir", str(folder), "--run-name", key])
            for key, (script, flags) in COMMANDS.items()
        }
    )


def weights(runs, key):
    return torch.load(runs[0] / key / "agent.pt", weights_only=True)


def assert_bit_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("key", [key for key in COMMANDS if key != "not finite"])
def test_run_leaves_what_it_promises(runs, key):
    folder, done = runs[0] / key, runs[1][key]
    assert done.returncode == 0, done.stderr
    script, flags = COMMANDS[key]
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == script and config["device"] == "cpu" and config["torch_threads"] == 1
    assert config["args"]["seed"] == 3 and config["args"]["num_envs"] == int(flags[1])
    assert config["precision"] == ("bf16" if "bf16" in key else "fp32")
    assert config["versions"].keys() == {"python", "torch", "envpool", "gymnasium", "numpy"}
    assert config["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", config["git_commit"])
    assert (folder / "episodes.csv").read_text().startswith("global_step,return,length\n")
    state = weights(runs, key)
    assert all(tensor.isfinite().all() for tensor in state.values())
    last = done.stdout.strip().splitlines()[-3:]
    assert "mean return" in last[0] and "steps per second" in last[1] and str(folder) in last[2]
    assert "SPS" in done.stderr and "return" in done.stderr  # the progress bar


def test_coefficients_0_are_the_baseline_to_the_last_bit(runs):
    baseline, deep_spi = weights(runs, "baseline"), weights(runs, "deep_spi at 0")
    assert_bit_equal(baseline, {name: deep_spi[name] for name in baseline})
    start = deep_spi_ppo_atari.Agent(6, "exact", torch.Generator().manual_seed(3)).state_dict()
    world_model = [name for name in deep_spi if "_model" in name]
    assert world_model and all(torch.equal(deep_spi[name], start[name]) for name in world_model)  # it never ran
    assert not torch.equal(baseline["fc.weight"], weights(runs, "deep_spi")["fc.weight"])


@pytest.mark.parametrize("key", ["deep_spi", "vector"])
def test_one_seed_one_result(runs, key):
    assert_bit_equal(weights(runs, key), weights(runs, f"{key} again"))
    episodes = [(runs[0] / name / "episodes.csv").read_text() for name in (key, f"{key} again")]
    assert episodes[0] == episodes[1]


@pytest.mark.parametrize("key", ["deep_spi at 0", "deep_spi additive", "deep_spi published", "deep_spi bf16"])
def test_switches_change_the_result(runs, key):
    assert not torch.equal(weights(runs, "deep_spi")["fc.weight"], weights(runs, key)["fc.weight"])


def test_stickiness_changes_the_task(runs):
    assert (runs[0] / "vector" / "episodes.csv").read_text() != (runs[0] / "vector sticky" / "episodes.csv").read_text()


@pytest.mark.parametrize(
    "key, agent",
    [
        ("deep_spi", lambda: deep_spi_ppo_atari.Agent(6, "exact", torch.Generator())),
        ("deep_spi additive", lambda: deep_spi_ppo_atari.Agent(6, "exact", torch.Generator())),
        ("vector", lambda: deep_spi_ppo.Agent(4, 2, "exact", torch.Generator())),
    ],
)
def test_spectral_norms_are_1_after_training(runs, key, agent):
    """After 64 updates (128 for vectors), the largest singular value of every normalised weight, by LAPACK."""
    agent = agent()
    agent.load_state_dict(weights(runs, key))
    layers = [module for module in agent.modules() if hasattr(module, "normalized_weight")]
    assert len(layers) == 6
    for layer in layers:
        before = layer.normalized_weight().detach()
        matrices = before.reshape(layer.groups, len(before) // layer.groups, -1)
        sigma = torch.linalg.svdvals(matrices.double())[:, 0]
        torch.testing.assert_close(sigma, torch.ones_like(sigma), rtol=0, atol=1e-3)
        assert torch.equal(before, layer.normalized_weight())  # a forward does not change it


def test_a_loss_that_is_not_finite_stops_the_run(runs):
    folder, done = runs[0] / "not finite", runs[1]["not finite"]
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "stopped at step 32" in lines[0] and "losses/policy_loss" in lines[0]
    assert "agent.pt" in lines[1]
    torch.manual_seed(3)  # as the script starts: the weights kept are those from before the first iteration
    start = deep_spi_ppo_atari.Agent(6, "exact", torch.Generator().manual_seed(3)).state_dict()
    assert_bit_equal(torch.load(folder / "agent.pt", weights_only=True), start)


def test_episodes_add_up(runs):
    """CartPole's return is its length; episodes neither overlap nor outlast the run."""
    with open(runs[0] / "vector" / "episodes.csv") as file:
        rows = [(int(step), float(value), int(length)) for step, value, length in list(csv.reader(file))[1:]]
    assert rows and all(value == length and 8 <= length <= 500 for _, value, length in rows)
    steps = [step for step, _, _ in rows]
    assert steps == sorted(steps) and steps[-1] <= 2048
    # every env-step is a real row of some episode, an auto-reset dummy (one per episode), or in an unfinished episode
    used = sum(length + 1 for _, _, length in rows)
    assert 2048 - 8 * 500 <= used <= 2048 + len(rows)


def logged(runs, key):
    events = EventAccumulator(str(runs[0] / key))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_readme_names_every_metric(runs):
    table = set(re.findall(r"^\| `(\w+/\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    baseline, deep_spi, deepmdp = (logged(runs, key) for key in ("baseline", "deep_spi", "deepmdp"))
    episode = {"charts/episodic_return", "charts/episodic_length"}  # too short to end a game of Pong
    assert logged(runs, "vector") == deep_spi | episode == table - {"world_model/gradient_penalty"}
    assert deepmdp | episode | {"spi/utility_mean", "spi/penalty_mean"} == table
    assert baseline < deep_spi and not [name for name in baseline if name.startswith("world_model/")]
