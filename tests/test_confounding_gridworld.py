"""Tests of confounding_gridworld.py: the exact MDP, the vectorised environment, the start, the update, intervals."""

import ast
import itertools
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import confounding_gridworld as cg

ROOT = Path(__file__).parent.parent
GOLDEN = sorted((ROOT / "tests" / "golden" / "gridworld").glob("confounding_gridworld_*.npz"))
POLICIES = ("right", "up_at_both", "optimal", "uniform")
TINY = cg.Args(start="fresh", total_timesteps=64, num_envs=4, num_steps=8, num_minibatches=2, update_epochs=1)
TINY_FLAGS = "--start fresh --total-timesteps 96 --num-envs 4 --num-steps 8 --update-epochs 1"


@pytest.fixture(autouse=True)
def one_thread():
    """As in the script: bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def world():
    return cg.make_gridworld(5, 0.2, 0.99)


# ==== The MDP ====
def test_there_are_two_golden_gridworlds():
    assert [path.stem for path in GOLDEN] == ["confounding_gridworld_n10_eps01", "confounding_gridworld_n5_eps02"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_gridworld_equals_the_golden_one(path):
    with np.load(path) as golden:
        world = cg.make_gridworld(int(golden["n_path"]), float(golden["epsilon"]), 0.99)
        np.testing.assert_array_equal(world.P.astype(np.float32), golden["P"])
        np.testing.assert_array_equal(world.R.astype(np.float32), golden["R"])
        np.testing.assert_array_equal(world.coords, golden["state_coords"])
        np.testing.assert_array_equal(world.symbols, golden["symbols"])
        np.testing.assert_array_equal(world.is_terminal, golden["is_terminal"])
        np.testing.assert_array_equal(world.intensity, golden["grid_intensity"])
        np.testing.assert_array_equal(world.pictures, golden["obs"])
        np.testing.assert_array_equal(world.critical, golden["critical_states"])
        assert world.pictures.dtype == golden["obs"].dtype == np.uint8
        assert world.start == golden["initial_state"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_exact_values_equal_the_golden_ones(path, policy):
    with np.load(path) as golden:
        world = cg.make_gridworld(int(golden["n_path"]), float(golden["epsilon"]), 0.99)
        V = cg.value(world.P, world.R, golden[f"pi_{policy}"].astype(float), 0.99)
        np.testing.assert_allclose(V, golden[f"V_exact_{policy}"], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("n_path, epsilon", [(2, 0.5), (7, 0.01), (81, 0.9)])
def test_gridworld_of_any_size(n_path, epsilon):
    world = cg.make_gridworld(n_path, epsilon, 0.99)
    S = 2 * n_path + 6
    assert world.P.shape == (S, 4, S) and world.pictures.shape == (S, 1, 84, 84)
    np.testing.assert_allclose(world.P.sum(-1), 1)
    assert len(np.unique(world.pictures.reshape(S, -1), axis=0)) == S  # no two states look alike
    corridor = np.arange(n_path)
    assert cg.value(world.P, world.R, np.eye(4)[np.full(S, cg.RIGHT)], 0.99)[world.start] == pytest.approx(
        0.99**2 * (0.99**corridor).sum()
    )


# ==== The vectorised environment ====
def test_rollouts_have_the_frequencies_of_P(world):
    """Pearson's statistic of every (s, a) against P: each below its 1e-6 quantile, and no transition that P forbids."""
    rng = np.random.default_rng(0)
    envs = cg.VectorEnv(world, 500, rng)
    counts = np.zeros(world.P.shape)
    pi = np.array([0.05, 0.05, 0.05, 0.85])
    done = np.zeros(500, dtype=bool)
    before = envs.states
    for _ in range(400):
        actions = rng.choice(4, size=500, p=pi)
        after, rewards, terminated, truncated = envs.step(actions)
        real = ~done
        np.add.at(counts, (before[real], actions[real], after[real]), 1)
        np.testing.assert_array_equal(rewards[real], world.R[before[real], actions[real]])
        assert (after[done] == world.start).all() and (rewards[done] == 0).all()
        np.testing.assert_array_equal(terminated, world.is_terminal[after])
        done, before = terminated | truncated, after
    visits = counts.sum(-1)
    assert (visits[~world.is_terminal] > 100).all() and (visits[world.is_terminal] == 0).all()
    assert (counts[world.P == 0] == 0).all()
    expected = visits[..., None] * world.P
    statistic = (np.square(counts - expected) / np.maximum(expected, 1e-9)).sum(-1)  # at most 2 outcomes: 1 degree
    assert (statistic < 23.93).all()  # the 1 - 1e-6 quantile of chi-square with 1 degree of freedom
    junction = np.flatnonzero(world.symbols == "@")[0]
    assert (counts[junction] > 0).sum(-1).tolist() == [2, 2, 2, 2]


def test_truncation_after_200_steps_and_reset(world):
    envs = cg.VectorEnv(world, 3, np.random.default_rng(0))
    stay, right = np.full(3, cg.LEFT), np.array([cg.RIGHT, cg.LEFT, cg.LEFT])
    for step in range(1, 201):
        states, _, terminated, truncated = envs.step(right if step == 1 else stay)
        assert not terminated.any()
        # env 0 went to '@', where any action moves on: it waits in a corridor
        assert truncated.tolist() == [step == 200] * 3
    states, rewards, terminated, truncated = envs.step(np.full(3, cg.RIGHT))  # the reset ignores the action
    assert (states == world.start).all() and not (rewards.any() or terminated.any() or truncated.any())
    for step in range(1, 201):
        *_, truncated = envs.step(stay)
        assert truncated.tolist() == [step == 200] * 3


def test_the_end_is_terminated_not_truncated_at_step_200(world):
    envs = cg.VectorEnv(world, 1, np.random.default_rng(0))
    actions = [cg.LEFT] * (200 - 7) + [cg.RIGHT] * 7  # I, '@', five cells of a corridor: W in step 200
    for action in actions:
        states, _, terminated, truncated = envs.step(np.array([action]))
    assert world.symbols[states[0]] == "W" and terminated[0] and not truncated[0]


# ==== The numbers of a run ====
def test_decrease_and_drawdown_equal_naive_loops():
    rng = np.random.default_rng(0)
    for V in [*rng.normal(size=(50, 12)), np.arange(5.0), np.array([3.0])]:
        decrease = sum(max(0.0, V[n] - V[n + 1]) for n in range(len(V) - 1))
        drawdown = max([0.0] + [V[n] - V[m] for n in range(len(V)) for m in range(n + 1, len(V))])
        assert cg.total_decrease(V) == pytest.approx(decrease, abs=1e-12)
        assert cg.largest_drawdown(V) == pytest.approx(drawdown, abs=1e-12)


def test_share_outside_the_neighbourhood():
    pi = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    new_pi = torch.tensor([[0.5, 0.25, 0.12, 0.13], [0.29, 0.21, 0.25, 0.25]])  # ratios 1 .83 1.2+ 1.3; 1.16 .84 1 1
    assert cg.outside_neighbourhood(pi.log(), new_pi.log(), 0.15).tolist() == [0.75, 0.5]
    assert cg.outside_neighbourhood(pi.log(), new_pi.log(), 0.25).tolist() == [0.25, 0.0]


def test_state_visits_are_those_of_rollouts(world):
    pi = np.tile([0.1, 0.1, 0.1, 0.7], (len(world.P), 1))
    ahead, weights = np.eye(len(world.P))[world.start], np.zeros(len(world.P))
    for t in range(2000):
        weights += 0.99**t * ahead * ~world.is_terminal
        ahead = ahead @ np.einsum("sa,sat->st", pi, world.P)
    np.testing.assert_allclose(cg.state_visits(world, pi, 0.99), weights / weights.sum(), atol=1e-9)


def test_critical_distance(world):
    z = torch.zeros(len(world.P), 2)
    z[world.critical[0]] = torch.tensor([3.0, 4.0])
    inner = (~world.is_terminal).sum()  # one state is 5 away from each of the others, which are all at 0
    assert cg.critical_distance(z, world) == pytest.approx(5 / (5 * (inner - 1) / (inner * (inner - 1) / 2)))
    assert np.isnan(cg.critical_distance(torch.zeros_like(z), world))


# ==== The update ====
def minibatch(world, rows):
    """Rows of random transitions, in float64."""
    rng = np.random.default_rng(0)
    states, next_states = (torch.from_numpy(rng.integers(len(world.P), size=rows)) for _ in range(2))
    actions = torch.from_numpy(rng.integers(4, size=rows))
    numbers = [torch.from_numpy(rng.normal(size=rows)) for _ in range(3)]
    log_probs = torch.from_numpy(rng.normal(size=(rows, 4))).log_softmax(-1)
    mask = torch.from_numpy((rng.random(rows) < 0.9).astype(float))
    return states, next_states, cg.Transitions(actions, numbers[0], log_probs, *numbers[1:], mask)


@pytest.mark.parametrize("method", ["additive", "deep_spi"])
def test_encoding_once_gives_the_gradients_of_encoding_every_row(world, method):
    args = replace(TINY, method=method, latent_dim=3, reward_loss_coef=1.0, transition_loss_coef=1.0)
    torch.manual_seed(0)
    agent = cg.Agent(4, 3, torch.Generator().manual_seed(0)).double()
    pictures = torch.from_numpy(world.pictures)
    states, next_states, batch = minibatch(world, 40)
    noise = torch.randn((40, 3, 5), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for z, next_z in (
        cg.encode_once(agent, pictures, states, next_states),
        (agent.encode(pictures[states]), agent.encode(pictures[next_states])),
    ):
        loss, _ = cg.compute_loss(agent, batch, z, next_z, noise, args)
        gradients.append(torch.autograd.grad(loss, list(agent.parameters())))
    for once, every in zip(*gradients, strict=True):
        assert every.abs().max() > 0
        torch.testing.assert_close(once, every, rtol=1e-9, atol=1e-9)


def test_world_model_layers_have_spectral_norm_1():
    agent = cg.Agent(4, 2, torch.Generator().manual_seed(0))
    layers = [layer for layer in agent.modules() if isinstance(layer, cg.SpectralLinear)]
    assert len(layers) == 6
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
        inputs = torch.eye(layer.weight.shape[1])
        weight = layer(inputs) - layer(torch.zeros_like(inputs))
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-3)


def test_without_coefficients_every_method_is_ppo():
    """To the last bit; and at 1e-30 too, where the world model runs but float32 has no room for what it adds."""
    values = {}
    for method, coefficient in itertools.product(("additive", "deep_spi"), (0.0, 1e-30, 0.05)):
        args = replace(TINY, method=method, reward_loss_coef=coefficient, transition_loss_coef=coefficient)
        values[method, coefficient] = cg.train(replace(args, max_grad_norm=1e9))[1].V
    ppo = cg.train(replace(TINY, method="ppo", max_grad_norm=1e9))[1].V
    for (_, coefficient), V in values.items():
        assert np.array_equal(V, ppo) == (coefficient < 0.05)
    assert not np.array_equal(values["additive", 0.05], values["deep_spi", 0.05])


def test_zero_coefficients_with_the_world_model_running(world):
    """Not only because it is skipped: ℓ_R and ℓ_P at weight 0 leave PPO's loss and gradients as they are."""
    args = replace(TINY, reward_loss_coef=0.0, transition_loss_coef=0.0)
    torch.manual_seed(0)
    agent = cg.Agent(4, 1, torch.Generator().manual_seed(0)).double()
    states, next_states, batch = minibatch(world, 40)
    gradients = []
    for with_model in (False, True):
        z, next_z = cg.encode_once(agent, torch.from_numpy(world.pictures), states, next_states)
        noise = torch.ones((40, 1, 5), dtype=torch.float64)
        loss, _ = cg.compute_loss(agent, batch, z, next_z if with_model else None, noise, args)
        loss.backward()
        gradients.append([p.grad.clone() for p in (*agent.encoder.parameters(), *agent.actor.parameters())])
        agent.zero_grad()
    for without, with_zero in zip(*gradients, strict=True):
        assert torch.equal(without, with_zero)


def test_terminal_states_have_no_share_outside_the_neighbourhood(world, monkeypatch):
    """The policy never acts there, whatever an update does to it."""
    monkeypatch.setattr(cg, "outside_neighbourhood", lambda *_: world.is_terminal + 0.25 * ~world.is_terminal)
    assert cg.train(TINY)[0]["outside_neighbourhood"] == 0.25


def test_what_is_learned_from_is_the_reward_over_n(world, monkeypatch):
    """RIGHT to the end brings 1 to the agent, and the exact values stay in the world's own units."""
    seen, compute_gae = [], cg.compute_gae
    monkeypatch.setattr(cg, "compute_gae", lambda rewards, *rest: seen.append(rewards) or compute_gae(rewards, *rest))
    V = cg.train(replace(TINY, total_timesteps=2048, num_envs=128, num_steps=16))[1].V
    seen = torch.stack(seen).flatten().double()
    assert set((seen * 5).round(decimals=4).tolist()) <= set(np.r_[world.R].round(4).flatten())
    assert (seen * 5).isclose(torch.ones(1).double()).sum() > 100
    uniform = np.full((len(world.P), 4), 0.25)  # a fresh actor's logits are near 0
    assert V[0, world.start] == pytest.approx(cg.value(world.P, world.R, uniform, 0.99)[world.start], abs=0.1)


# ==== The confounded start ====
@pytest.mark.parametrize("latent_dim", [1, 8])
def test_the_start_merges_the_critical_states_and_fits_the_start_policy(world, latent_dim):
    """All methods start from the same weights: φ tells the columns apart, which V_b needs, but not the two '!'."""
    args = replace(TINY, start="confounded", latent_dim=latent_dim)
    agent, _ = cg.make_agent(replace(args, method="ppo"), world)
    if latent_dim == 1:
        other, _ = cg.make_agent(replace(args, method="deep_spi"), world)
        for first, second in zip(agent.parameters(), other.parameters(), strict=True):
            assert torch.equal(first, second)
    z, log_pi, state_values = cg.evaluate(agent, torch.from_numpy(world.pictures))
    pi_b = cg.start_policy(args, len(world.P))
    visited = ~world.is_terminal
    np.testing.assert_allclose(log_pi.exp().numpy()[visited], pi_b[visited], rtol=0.1)
    V_b = cg.value(world.P, world.R, pi_b, 0.99)
    errors = (5 * state_values.numpy() - V_b)[visited]  # the critic's reward is the world's over n
    assert np.sqrt((errors**2).mean()) < 0.25 * V_b[visited].std()
    assert cg.critical_distance(z, world) < 0.2
    fresh, _ = cg.make_agent(replace(args, start="fresh"), world)
    assert cg.critical_distance(fresh.encode(torch.from_numpy(world.pictures)).detach(), world) > 0.4


def test_a_start_that_does_not_fit_fails(world, monkeypatch):
    monkeypatch.setattr(cg, "FIT_STEPS", 1)
    with pytest.raises(cg.RunFailed, match="did not fit"):
        cg.make_agent(replace(TINY, start="confounded"), world)


def test_a_start_that_does_not_merge_the_critical_states_fails(world):
    """UP at 5 % is too often: V_b and R̄ tell the top '!' from the bottom one. Policy and V do fit."""
    with pytest.raises(cg.RunFailed, match="relative distance of the critical states") as failed:
        cg.make_agent(replace(TINY, start="confounded", start_up=0.05), world)
    policy, variance, distance = map(float, re.findall(r"\d\.\d\d", str(failed.value))[:3])
    assert policy < 0.1 and variance < 0.1 and distance >= 0.2


def test_a_run_that_diverges_is_stopped():
    with pytest.raises(cg.RunFailed, match="not finite"):
        cg.train(replace(TINY, learning_rate=1e30, max_grad_norm=1e30))


# ==== Intervals ====
@pytest.mark.parametrize("runs", [3, 10])
def test_intervals_cover_the_mean_as_often_as_they_say(runs):
    """20,000 samples at once: the share that covers has a standard error of 0.0015."""
    low, high = cg.mean_interval(np.random.default_rng(0).normal(size=(runs, 20_000)))
    assert np.mean((low < 0) & (high > 0)) == pytest.approx(0.95, abs=0.006)


def test_interval_of_known_numbers():
    low, high = cg.mean_interval(np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    half = 4.302653 / np.sqrt(3)  # Student's t with 2 degrees of freedom, standard deviation 1
    np.testing.assert_allclose([low, high], [[2 - half, 5], [2 + half, 5]], rtol=1e-6)
    assert cg.summary_row("x", np.array([[1.0], [2.0], [3.0]])) == "| x | 3 | 2.00 [-0.48, 4.48] |\n"
    assert cg.summary_row("x", np.array([[1.0]])) == "| x | 1 | 1.00 |\n"  # one run has no interval


# ==== Command line ====
def test_command_line_with_each_method(tmp_path):
    command = [sys.executable, str(ROOT / "confounding_gridworld.py"), *TINY_FLAGS.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    flags = ["--num-seeds", "2", "--seed", "3", "--out-dir", str(tmp_path / "out")]
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in cg.METHODS.values():
        assert f"{name}, seed 3: largest drawdown" in done.stdout and f"{name}, seed 4: largest" in done.stdout
        assert f"| {name} | 2 |" in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["gridworld.png", "values.png"]


def test_the_summary_has_every_metric_of_a_run(tmp_path, monkeypatch, capsys):
    metrics, history = cg.train(TINY)
    V_start = history.V[:, cg.make_gridworld(5, 0.2, 0.99).start]
    assert metrics["total_decrease"] == cg.total_decrease(V_start) and len(history.V) == 3
    assert (metrics["distance_start"], metrics["distance_end"]) == (history.distance[0], history.distance[-1])
    assert len(history.pi) == len(history.distance) == 3 and len(history.penalty) == 2
    np.testing.assert_allclose(history.pi.sum(-1), 1, atol=1e-6)
    assert metrics["start_value"] == V_start[0] and metrics["final_value"] == V_start[-1]
    assert 0 <= metrics["outside_neighbourhood"] <= 1 and metrics["seconds"] > 0
    assert cg.METRICS.keys() == metrics.keys() - {"start_value", "seconds"}
    monkeypatch.setattr(cg, "train", lambda args: (metrics, history))
    cg.main(replace(TINY, method="ppo", num_seeds=1, out_dir=str(tmp_path)))
    numbers = " | ".join(f"{metrics[name]:.2f}" for name in cg.METRICS)
    assert f"| PPO | 1 | {numbers} |" in capsys.readouterr().out


def test_a_failed_run_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cg, "FIT_STEPS", 1)
    with pytest.raises(SystemExit) as stopped:
        cg.main(replace(TINY, start="confounded", seed=12, num_seeds=1, out_dir=str(tmp_path)))
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    errors = captured.err.strip().splitlines()
    assert len(errors) == len(cg.METHODS) and "PPO, seed 12" in errors[0] and "did not fit" in errors[0]
    assert captured.out == "" and not os.listdir(tmp_path)


def test_a_failed_run_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    train = cg.train

    def train_but_additive(args):
        if args.method == "additive":
            raise cg.RunFailed("not finite: losses/value_loss")
        return train(args)

    monkeypatch.setattr(cg, "train", train_but_additive)
    with pytest.raises(SystemExit) as stopped:
        cg.main(replace(TINY, method="all", num_seeds=1, out_dir=str(tmp_path)))
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.strip() == "error: additive, seed 1: not finite: losses/value_loss"
    assert "| PPO | 1 |" in captured.out and "| Deep SPI | 1 |" in captured.out
    assert sorted(os.listdir(tmp_path)) == ["gridworld.png", "values.png"]


BAD = {  # flags, what the one line must contain
    "no corridor": ("--n-path 0", ["--n-path", "0", "[2, 81]"]),
    "no room for F": ("--n-path 1", ["--n-path", "1", "'@'"]),
    "epsilon 0": ("--epsilon 0", ["--epsilon", "0.0", "(0, 1)"]),
    "epsilon 1": ("--epsilon 1", ["--epsilon", "1.0", "(0, 1)"]),
    "epsilon too small": ("--epsilon 1e-320", ["--epsilon", "1e-320", "too small"]),
    "gamma too small": ("--gamma 1e-4 --n-path 81", ["--gamma", "0.0001", "too small"]),
    "seeds too large": ("--seed 4294967295 --num-seeds 2", ["--seed", "4294967295", "num_seeds"]),
    "no neighbourhood": ("--clip-coef 1", ["--clip-coef", "1.0", "1 < C < 2"]),
    "no latent": ("--latent-dim 0", ["--latent-dim", "0", "[1, 512]"]),
    "never UP": ("--start-up 0", ["--start-up", "0.0", "(0, 0.5]"]),
    "UP of no start": ("--start fresh --start-up 0.01", ["--start-up", "0.01", "fresh"]),
    "no environments": ("--num-envs 0", ["--num-envs", "0", "at least 1"]),
    "under a rollout": ("--total-timesteps 1000", ["--total-timesteps", "1000", "1024"]),
    "odd minibatches": ("--num-minibatches 3", ["--num-minibatches", "3", "must divide", "1024"]),
    "no discount": ("--gamma 1", ["--gamma", "1.0", "(0, 1)"]),
    "step size not a number": ("--learning-rate nan", ["--learning-rate", "nan", "positive"]),
    "negative coefficient": ("--reward-loss-coef -1", ["--reward-loss-coef", "-1.0", "not negative"]),
    "negative seed": ("--seed -1", ["--seed", "-1"]),
    "no seeds": ("--num-seeds 0", ["--num-seeds", "0", "at least 1"]),
    "file in the way": ("--out-dir FILE", ["--out-dir", "file", "folder"]),
}  # fmt: skip


@pytest.mark.parametrize("key", BAD)
def test_bad_input_is_refused_in_one_line(key, tmp_path, monkeypatch, capsys):
    flags, words = BAD[key]
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cg, "train", lambda _: pytest.fail("a run was made"))
    with pytest.raises(SystemExit) as refused:
        cg.main(cg.tyro.cli(cg.Args, args=flags.replace("FILE", "file").split()))
    captured = capsys.readouterr()
    assert refused.value.code == 2
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1, captured
    for word in words:
        assert word in captured.err
    assert os.listdir(tmp_path) == ["file"]


# ==== The script's place among its siblings ====
def definitions(script):
    """Source text of each top-level function and class."""
    source = (ROOT / script).read_text()
    lines = source.splitlines()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


def test_equations_are_those_of_the_siblings():
    ours, siblings = definitions("confounding_gridworld.py"), definitions("deep_spi_ppo.py")
    differing = {name for name in ours.keys() & siblings.keys() if ours[name] != siblings[name]}
    assert differing == {
        *("Args", "RewardModel", "TransitionModel", "Agent", "train"),
        *("Transitions", "compute_loss"),  # here states stand for observations, and are encoded once
    }
    assert {"compute_loss", "compute_gae", "clipped_objective", "transition_loss"} <= ours.keys() & siblings.keys()
    same = ("advantages = normalize(", "if args.loss_placement ==", "is_clipped", "utility", "penalty", "_loss = ")
    lines = [
        [line for line in text["compute_loss"].splitlines() if any(w in line for w in same)]
        for text in (ours, siblings)
    ]
    assert lines[0] == lines[1]
    assert ours["value"] == definitions("safe_policy_improvement.py")["value"]


def test_every_flag_is_read():
    text = "\n".join(body for name, body in definitions("confounding_gridworld.py").items())
    text = text.replace(text[text.index("def __post_init__") : text.index("def loss_placement")], "")
    for field in fields(cg.Args):
        assert re.search(rf"\b(args|self)\.{field.name}\b", text), field.name
