"""Each script end to end at small size on real environments: one run each from a shell, the others in this process."""

import contextlib
import io
import json
import re
import shutil
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
    "atari published": (ATARI, "--spectral-norm published"),
    "vector published": (VECTOR, "--spectral-norm published"),
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
            *f"--seed 3 --device cpu --runs-dir {folder}".split(),
            "--run-name",
            key,
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
    assert config["script"] == f"{script}.py" and config["device"] == "cpu" and config["torch_threads"] == 1
    assert config["args"]["seed"] == 3 and config["args"].keys() == vars(SCRIPTS[script].Args()).keys()
    assert config["precision"] == ("bf16" if "bf16" in key else "fp32")
    assert config["versions"].keys() == {"python", "torch", "envpool", "gymnasium", "numpy"}
    assert config["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", config["git_commit"])
    assert (folder / "episodes.csv").read_text().startswith("global_step,return,length\n")
    state = weights(runs, key)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not [name for name in state if "power_start" in name]  # weights load whatever the spectral rule
    last = done.stdout.strip().splitlines()[-3:]
    assert "mean return" in last[0] and "per second" in last[1] and str(folder) in last[2]
    assert "SPS" in done.stderr and "return" in done.stderr  # the progress bar


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
    "key", [key for key in RUNS if key.split()[-1] in ("0", "additive", "published", "bf16", "1", "sticky")]
)
def test_switches_change_the_result(runs, key):
    assert not torch.equal(weights(runs, RUNS[key][0])["fc.weight"], weights(runs, key)["fc.weight"])


@pytest.mark.parametrize(
    "key, agent",
    [
        (ATARI, lambda: deep_spi_ppo_atari.Agent(6, "exact", torch.Generator())),
        ("atari additive", lambda: deep_spi_ppo_atari.Agent(6, "exact", torch.Generator())),
        (VECTOR, lambda: deep_spi_ppo.Agent(4, 2, "exact", torch.Generator())),
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


@pytest.mark.parametrize(
    "flags, step, term", [("", 32, "losses/policy_loss"), ("--num-minibatches 1 --update-epochs 1", 32, "log_probs")]
)
def test_what_is_not_finite_stops_the_run(tmp_path, flags, step, term):
    """A loss; or, when an iteration's last step spoils the weights, the policy they give."""
    command = f"{SMALL[ATARI]} {flags} --learning-rate 1e30 --seed 3 --device cpu --run-name run --runs-dir {tmp_path}"
    done = run_here(ATARI, command.split())
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"stopped at step {step}" in lines[0] and term in lines[0]
    assert "agent.pt" in lines[1]
    args = deep_spi_ppo_atari.Args(seed=3)
    torch.manual_seed(args.seed)  # as the script starts: the weights kept are those from before the first iteration
    start = deep_spi_ppo_atari.Agent(6, "exact", torch.Generator()).state_dict()
    kept = torch.load(tmp_path / "run" / "agent.pt", weights_only=True)
    baseline = [name for name in start if "_model" not in name]
    assert_bit_equal({name: kept[name] for name in baseline}, {name: start[name] for name in baseline})
    assert all(tensor.isfinite().all() for tensor in kept.values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile takes a C++ compiler on a CPU")
@pytest.mark.parametrize("script, graphs", [(BASELINE, 1), (DEEPMDP, 1), (ATARI, 3), (VECTOR, 3)])
def test_compiled_networks_are_the_same_networks(script, graphs, tmp_path):
    """One iteration; rounding differs."""
    flags = SMALL[script].rsplit(" ", 1)[0] + (" 256" if script == VECTOR else " 32")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name in ("eager", "--compile"):
        own = [] if name == "eager" else [name]
        done = run_here(
            script,
            [*flags.split(), *f"--seed 3 --device cpu --runs-dir {tmp_path} --run-name".split(), name.strip("-"), *own],
        )
        assert done.returncode == 0, done.stderr
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] >= graphs) == bool(own)
    eager, compiled = (torch.load(tmp_path / name / "agent.pt", weights_only=True) for name in ("eager", "compile"))
    assert eager.keys() == compiled.keys()
    for name in ("fc.weight", "actor.weight", "critic.weight"):
        torch.testing.assert_close(compiled[name], eager[name], rtol=0, atol=5e-4)


def logged(runs, key):
    events = EventAccumulator(str(runs[0] / key))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_readme_names_every_metric(runs):
    table = set(re.findall(r"^\| `(\w+/\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    baseline, deep_spi, deepmdp = (logged(runs, key) for key in (BASELINE, ATARI, DEEPMDP))
    episode = {"charts/episodic_return", "charts/episodic_length"}  # too short to end a game of Pong
    assert logged(runs, VECTOR) == deep_spi | episode == table - {"world_model/gradient_penalty"}
    assert deepmdp | episode | {"spi/utility_mean", "spi/penalty_mean"} == table
    assert baseline < deep_spi and not [name for name in baseline if name.startswith("world_model/")]
