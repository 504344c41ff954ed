"""Each script end to end at small size on real environments: one run each from a shell, the others in this process."""

import contextlib
import io
import json
import re
import zipfile
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
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert zipfile.ZipFile(folder / "checkpoint.pt").testzip() is None
    assert_bit_equal(checkpoint["agent"], state)
    assert checkpoint["iterations"] == 4 and checkpoint["config"] == config and config["resumes"] == []
    assert {path.name for path in folder.iterdir() if not path.name.startswith("events.")} == {
        *("config.json", f"{script}.py", "episodes.csv", "checkpoint.pt", "agent.pt")
    }
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


def test_what_is_not_finite_later_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """A loss that spoils the weights in iteration 3: the checkpoint of iteration 2 is there, whole and finite."""
    compute_loss, calls = deep_spi_ppo.compute_loss, []

    def spoiling(*inputs):
        loss, stats = compute_loss(*inputs)
        calls.append(loss)
        return loss * (float("nan") if len(calls) == 2 * 32 + 1 else 1.0), stats

    monkeypatch.setattr(deep_spi_ppo, "compute_loss", spoiling)
    command = f"{SMALL[VECTOR]} --checkpoint-interval 1 --seed 3 --device cpu --run-dir {tmp_path / 'run'}"
    args = tyro.cli(deep_spi_ppo.Args, args=command.split())
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(FloatingPointError, match="not finite"):
        deep_spi_ppo.train(args)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["iterations"] == 2 and all(tensor.isfinite().all() for tensor in state["agent"].values())
    assert not (tmp_path / "run" / "agent.pt").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script, monkeypatch):
    """With the comment beside the field."""
    monkeypatch.setenv("COLUMNS", "250")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        tyro.cli(SCRIPTS[script].Args, args=["--help"])
    shown = re.sub(r"[\s│]+", " ", out.getvalue())
    fields = re.findall(r"^    (\w+): .*  # (.*)$", (ROOT / f"{script}.py").read_text(), re.MULTILINE)
    names = list(vars(SCRIPTS[script].Args()))
    explained = dict(field for field in fields if field[0] in names)
    assert list(explained) == names
    for name, explanation in explained.items():
        assert f"--{name.replace('_', '-')}" in shown and explanation in shown


def logged(runs, key):
    """Names of a run's curves and histograms."""
    events = EventAccumulator(str(runs[0] / key))
    events.Reload()
    return {*events.Tags()["scalars"], *events.Tags()["histograms"]}


def names_in(script):
    """What a script may log: all its strings of the form "room/name"."""
    rooms = "charts|losses|world_model|spi"
    return set(re.findall(rf'"((?:{rooms})/\w+)"', (ROOT / f"{script}.py").read_text()))


def test_documented_metrics_are_the_logged_ones(runs):
    """Table, source and event files have the same names; the Atari runs here are too short to end a game of Pong."""
    table = set(re.findall(r"^\| `(\w+/\w+)` \|", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE))
    loggers = [path.stem for path in ROOT.glob("*.py") if "SummaryWriter" in path.read_text(encoding="utf-8")]
    scripts = [name for name in loggers if not name.startswith("dream_spi")]  # docs/dreamspi.md: test_dreamspi.py
    assert set(SCRIPTS) <= set(scripts)
    assert table == set().union(*map(names_in, scripts))
    episode = {"charts/episodic_return", "charts/episodic_length"}
    for key in (BASELINE, ATARI, DEEPMDP, VECTOR):
        assert logged(runs, key) == names_in(key) - (episode if key != VECTOR else set()), key
    baseline, deep_spi = logged(runs, BASELINE), logged(runs, ATARI)
    assert baseline < deep_spi and not [name for name in baseline if name.startswith("world_model/")]
