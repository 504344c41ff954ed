"""Each script end to end at small size on real environments: one run each from a shell, the others in this process."""

import contextlib
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deep_spi_ppo
import deep_spi_ppo_atari
import deepmdp_ppo_atari
import ppo_baseline
from tests.launch import ROOT, launch_all

SCRIPTS = {script.__name__: script for script in (deep_spi_ppo, deep_spi_ppo_atari, deepmdp_ppo_atari, ppo_baseline)}
ATARI, BASELINE, DEEPMDP, VECTOR = "deep_spi_ppo_atari", "ppo_baseline", "deepmdp_ppo_atari", "deep_spi_ppo"
SMALL = {  # 4 iterations of 16 updates, or 32 for vectors
    **dict.fromkeys((ATARI, BASELINE, DEEPMDP), "--precision fp32 --num-envs 4 --num-steps 8 --total-timesteps 128"),
    VECTOR: "--num-envs 8 --num-steps 32 --total-timesteps 1024",
}
ZERO = "--reward-loss-coef 0 --transition-loss-coef 0"
FROM_A_SHELL = {script: (script, "") for script in SCRIPTS}
RUNS = FROM_A_SHELL | {
    "atari again": (ATARI, ""),
    "vector again": (VECTOR, ""),
    "deepmdp again": (DEEPMDP, ""),
    "baseline again": (BASELINE, ""),
    "atari at 0": (ATARI, ZERO),
    "vector at 0": (VECTOR, ZERO),
    "atari additive": (ATARI, "--loss-placement additive"),
    "vector additive": (VECTOR, "--loss-placement additive"),
    "atari gated": (ATARI, "--loss-placement gated"),
    "vector gated": (VECTOR, "--loss-placement gated"),
    "atari bf16": (ATARI, "--precision bf16"),
    "deepmdp bf16": (DEEPMDP, "--precision bf16"),
    "vector bf16": (VECTOR, "--precision bf16"),
    "atari chunk 1": (ATARI, "--chunk-length 1"),
    "atari 18 actions": (ATARI, "--env-id Boxing-v5"),
    "vector sticky": (VECTOR, "--sticky 0.5"),
    **{
        env_id: (VECTOR, f"--env-id {env_id}")
        for env_id in ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v3", "Catch-v0", "Acrobot-v1", "LunarLander-v3")
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As `launch` has it: the bits of a result depend on the number of threads, from the orthogonal weights on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_here(script, flags):
    """What `launch` does, without the ten seconds that loading torch and EnvPool takes."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            SCRIPTS[script].train(tyro.cli(SCRIPTS[script].Args, args=flags))
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run above; its folder is <first item>/<key>."""
    folder = tmp_path_factory.mktemp("runs")

    def flags(key):
        script, extra = RUNS[key]
        return [
            *SMALL[script].split(),
            *extra.split(),
            *["--seed", "3", "--device", "cpu", "--run-dir"],
            str(folder / key),
        ]

    done = launch_all({key: (f"{key}.py", flags(key)) for key in FROM_A_SHELL})
    return folder, done | {key: run_here(RUNS[key][0], flags(key)) for key in RUNS.keys() - done.keys()}


def weights(runs, key):
    return torch.load(runs[0] / key / "agent.pt", weights_only=True)


def assert_bit_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("key", RUNS)
def test_run_leaves_what_it_promises(runs, key):
    folder, done = runs[0] / key, runs[1][key]
    assert done.returncode == 0, done.stderr
    script, _ = RUNS[key]
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == f"{script}.py" and config["args"]["device"] == "cpu" and config["torch_threads"] == 1
    assert config["args"]["seed"] == 3 and config["args"].keys() == vars(SCRIPTS[script].Args()).keys()
    assert config["args"]["precision"] == ("bf16" if "bf16" in key else "fp32")
    assert config["versions"].keys() == {"python", "torch", "envpool", "numpy"}
    commit = config["git_commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?(-untracked)?", commit)
    assert (folder / f"{script}.py").read_bytes() == (ROOT / f"{script}.py").read_bytes()
    assert (folder / "episodes.csv").read_text().startswith("global_step,return,length\n")
    state = weights(runs, key)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert f"{folder}: complete" in done.stdout
    assert "steps" in done.stderr  # the progress bar


def test_coefficients_0_are_the_baseline_to_the_last_bit(runs):
    baseline, deep_spi = weights(runs, BASELINE), weights(runs, "atari at 0")
    assert_bit_equal(baseline, {name: deep_spi[name] for name in baseline})
    assert not torch.equal(baseline["fc.weight"], weights(runs, ATARI)["fc.weight"])


def test_coefficients_0_do_not_run_the_world_model(runs):
    assert logged(runs, "atari at 0") == logged(runs, BASELINE)
    assert not [name for name in logged(runs, "vector at 0") if name.startswith("world_model/")]


@pytest.mark.parametrize(
    "script, again", [(ATARI, "atari"), (VECTOR, "vector"), (DEEPMDP, "deepmdp"), (BASELINE, "baseline")]
)
def test_one_seed_one_result(runs, script, again):
    """From a shell and in this process."""
    assert_bit_equal(weights(runs, script), weights(runs, f"{again} again"))
    episodes = [(runs[0] / key / "episodes.csv").read_text() for key in (script, f"{again} again")]
    assert episodes[0] == episodes[1]


@pytest.mark.parametrize(
    "key", [key for key in RUNS if key.split()[-1] in ("0", "additive", "gated", "bf16", "1", "sticky")]
)
def test_switches_change_the_result(runs, key):
    assert not torch.equal(weights(runs, RUNS[key][0])["fc.weight"], weights(runs, key)["fc.weight"])


@pytest.mark.parametrize(
    "key, agent",
    [
        (ATARI, lambda: deep_spi_ppo_atari.Agent(6)),
        ("atari additive", lambda: deep_spi_ppo_atari.Agent(6)),
        (VECTOR, lambda: deep_spi_ppo.Agent(4, 2)),
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


@pytest.mark.parametrize("flags", ["", "--num-minibatches 1 --update-epochs 1"])
def test_what_is_not_finite_stops_the_run(tmp_path, flags):
    """In the iteration in which it comes up, with its name, and without weights."""
    command = f"{SMALL[ATARI]} {flags} --learning-rate 1e30 --seed 3 --device cpu --run-dir {tmp_path / 'run'}"
    args = tyro.cli(deep_spi_ppo_atari.Args, args=command.split())
    with (
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(FloatingPointError, match=r"not finite: (losses/\w+|log_probs or value)"),
    ):
        deep_spi_ppo_atari.train(args)
    assert not (tmp_path / "run" / "agent.pt").exists()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def logged(runs, key):
    events = EventAccumulator(str(runs[0] / key))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_documented_metrics_are_the_logged_ones(runs):
    table = set(re.findall(r"^\| `(\w+/\w+)` \|", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE))
    for key in (BASELINE, ATARI, DEEPMDP, VECTOR):
        assert logged(runs, key) <= table, logged(runs, key) - table
    baseline, deep_spi = logged(runs, BASELINE), logged(runs, ATARI)
    assert baseline < deep_spi and not [name for name in baseline if name.startswith("world_model/")]
