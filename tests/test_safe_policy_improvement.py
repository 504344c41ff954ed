"""Tests of safe_policy_improvement.py: linear programme, monotonicity, bounds and their worst cases, command line."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import safe_policy_improvement as spi  # noqa: E402

GAMMA = 0.9


def small_args(**flags) -> spi.Args:
    return spi.Args(n_states=12, n_actions=3, n_learned=25, n_episodes=20_000, epsilon=1e-5, **flags)


def optimal_value(mdp: spi.MDP) -> np.ndarray:
    """V* by value iteration, which shares nothing with policy iteration in the script."""
    V = np.zeros(mdp.R.shape[:-1])
    for _ in range(300):
        V = (mdp.R + GAMMA * np.einsum("...sat,...t->...sa", mdp.P, V)).max(-1)
    return V


# ==== 1. The neighbourhood ====
def test_improve_solves_the_linear_programme():
    rng = np.random.default_rng(0)
    for case in range(200):
        n_actions = rng.integers(2, 8)
        pi = rng.dirichlet(np.full(n_actions, rng.choice([0.1, 1.0, 10.0])))
        pi = (pi + 1e-9) / (pi + 1e-9).sum()
        advantage = rng.normal(size=n_actions).round(0 if case % 2 else 9)  # rounded to whole numbers: ties
        C = rng.uniform(1.001, 1.999)
        new_pi = spi.improve(pi, advantage, C)
        bounds = np.stack([(2 - C) * pi, C * pi], axis=-1)
        best = linprog(-advantage, A_eq=np.ones((1, n_actions)), b_eq=[1.0], bounds=bounds)
        assert best.success
        assert new_pi @ advantage == pytest.approx(-best.fun, abs=1e-9)
        assert new_pi.sum() == pytest.approx(1, abs=1e-12)
        assert (new_pi >= bounds[:, 0] - 1e-15).all() and (new_pi <= bounds[:, 1] + 1e-15).all()
        assert (new_pi > 0).all()


def test_improve_of_a_batch_is_improve_of_each_state():
    rng = np.random.default_rng(1)
    pi, advantage = rng.dirichlet(np.ones(4), size=(3, 5)), rng.normal(size=(3, 5, 4))
    batch = spi.improve(pi, advantage, 1.4)
    for index in np.ndindex(3, 5):
        np.testing.assert_array_equal(batch[index], spi.improve(pi[index], advantage[index], 1.4))


@pytest.mark.parametrize("C", [1.05, 1.5, 1.95])
def test_exact_improvement_is_monotone_on_1000_random_mdps(C):
    mdp = spi.garnet(np.random.default_rng(2), 8, 3, 0.1, batch=(1000,))
    values = list(spi.policy_improvement(mdp, C, GAMMA, 40))
    steps = np.diff(values, axis=0)
    assert steps.min() >= -1e-9
    assert (steps.max((0, 2)) > 1e-3).all()  # no MDP stands still, which would be monotone as well
    assert (values[-1] <= optimal_value(mdp) + 1e-9).all()


@pytest.mark.parametrize("C", [1.1, 1.5, 1.9])
@pytest.mark.parametrize("name", ["garnets", "gridworld"])
def test_exact_improvement_reaches_the_optimum(C, name):
    mdp = spi.gridworld() if name == "gridworld" else spi.garnet(np.random.default_rng(3), 8, 3, 0.1, batch=(100,))
    *_, V = spi.policy_improvement(mdp, C, GAMMA, 400)
    np.testing.assert_allclose(V, optimal_value(mdp), atol=1e-9)


def test_plan_finds_the_best_policy_and_the_best_of_the_neighbourhood():
    rng = np.random.default_rng(10)
    mdp = spi.garnet(rng, 8, 3, 0.1)
    best = spi.plan(mdp.P, mdp.R, GAMMA, spi.greedy)
    np.testing.assert_allclose(spi.value(mdp.P, mdp.R, best, GAMMA), optimal_value(mdp), atol=1e-9)
    pi_b = rng.dirichlet(np.ones(3), size=8)
    near = spi.plan(mdp.P, mdp.R, GAMMA, lambda Q: spi.improve(pi_b, Q, 1.5))
    V = spi.value(mdp.P, mdp.R, near, GAMMA)
    Q = mdp.R + GAMMA * mdp.P @ V
    for s in range(8):  # Bellman's equation of the neighbourhood, its maximum from scipy
        bounds = np.stack([0.5 * pi_b[s], 1.5 * pi_b[s]], axis=-1)
        assert V[s] == pytest.approx(-linprog(-Q[s], A_eq=np.ones((1, 3)), b_eq=[1.0], bounds=bounds).fun, abs=1e-9)


def test_greedy_steps_on_learned_models_fall_much_further_than_steps_in_the_neighbourhood():
    rng = np.random.default_rng(4)
    falls = {"greedy": [], "near": []}
    for _ in range(10):
        mdp = spi.garnet(rng, 12, 4, 0.1)
        for name, step in {
            "greedy": lambda pi, Q: spi.greedy(Q),
            "near": lambda pi, Q: spi.improve(pi, Q, 1.5),
        }.items():
            values = spi.improve_with_learned_models(mdp, GAMMA, 10, 50, rng, step)
            assert values.shape == (11, 12)
            falls[name].append(-np.diff(values, axis=0).min())
    assert min(falls["greedy"]) > 0.1
    assert max(falls["near"]) < min(falls["greedy"])


# ==== MDPs and models ====
def test_value_is_the_fixed_point_and_visits_are_the_sum_over_time():
    rng = np.random.default_rng(5)
    mdp = spi.garnet(rng, 6, 3, 0.2)
    pi = rng.dirichlet(np.ones(3), size=6)
    P_pi, V, visits, state = np.einsum("sa,sat->st", pi, mdp.P), np.zeros(6), np.zeros(6), mdp.start
    for _ in range(400):
        V = (pi * mdp.R).sum(1) + GAMMA * P_pi @ V
        visits, state = visits + state, state @ P_pi
    np.testing.assert_allclose(spi.value(mdp.P, mdp.R, pi, GAMMA), V, atol=1e-12)
    np.testing.assert_allclose(spi.expected_visits(mdp, pi), visits[:, None] * pi, atol=1e-12)


def test_rollout_has_the_frequencies_of_the_mdp():
    rng = np.random.default_rng(6)
    mdp = spi.garnet(rng, 5, 3, 0.2)
    pi = rng.dirichlet(np.ones(3), size=5)
    n_episodes = 200_000
    counts = spi.rollout(mdp, pi, n_episodes, rng)
    visits = counts.sum(-1)
    assert counts[..., -1].sum() == n_episodes
    np.testing.assert_allclose(visits / n_episodes, spi.expected_visits(mdp, pi), rtol=0.02)
    outcomes = np.concatenate([mdp.P, 1 - mdp.P.sum(-1, keepdims=True)], axis=-1)
    error = np.abs(counts / visits[..., None] - outcomes) * np.sqrt(visits[..., None])
    assert error.max() < 0.5 * 5  # five standard deviations of a frequency
    assert (counts[outcomes == 0] == 0).all()


def test_learned_model_is_the_average_and_falls_back_on_the_action():
    counts = np.zeros((3, 2, 4))
    counts[0, 0, [1, 3]] = 3, 1  # states 0 and 1 share latent 0
    counts[1, 0, 2] = 4
    counts[2, 1, 3] = 5
    R = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 7.0]])
    model_P, model_R = spi.learn_model(counts, R, np.array([0, 0, 1]))
    np.testing.assert_allclose(model_P[0, 0], [3 / 8, 4 / 8])
    np.testing.assert_allclose(model_R, [[0.5, 7.0], [0.5, 7.0]])  # the second row and column are predictions
    np.testing.assert_allclose(model_P[1, 0], model_P[0, 0])
    np.testing.assert_allclose(model_P[:, 1], 0)


def test_wasserstein_and_lipschitz_constant_against_scipy_and_all_pairs():
    rng = np.random.default_rng(7)
    position = np.sort(rng.uniform(1, 2, size=6))
    line = np.append(0, position)
    for _ in range(50):
        p, q = rng.dirichlet(np.ones(7), size=2)
        expected = wasserstein_distance(line, line, p, q)
        assert spi.wasserstein(p[1:], q[1:], position) == pytest.approx(expected, abs=1e-12)
        V = rng.normal(size=6)
        with_end = np.append(0, V)
        slopes = [abs(with_end[i] - with_end[j]) / abs(line[i] - line[j]) for i in range(7) for j in range(i)]
        assert spi.lipschitz_constant(V, position) == pytest.approx(max(slopes))


# ==== 2. Out-of-trajectory ====
@pytest.mark.parametrize("epsilon", [1e-5, 1e-3, 3e-2])
def test_mountain_model_minimises_the_losses_and_hallucinates_20(epsilon):
    mdp = spi.mountain()
    visits = spi.expected_visits(mdp, np.array([[1 - epsilon, epsilon]] * 3 + [[0.5, 0.5]] * 4))
    model_P, model_R = spi.learn_mountain(mdp, visits)
    assert model_R[6, 0] == 20 and mdp.R[6, 0] == -10
    L_R = (visits * np.abs(mdp.R - model_R)).sum()
    L_P = (visits * np.abs(mdp.P - model_P).sum(-1)).sum()
    for w in np.linspace(-2, 2, 81):
        other_L_R = (visits * np.abs(mdp.R - w * spi.HEIGHT[:, None])).sum()
        assert other_L_R >= L_R - 1e-12
    for q in np.linspace(0, 1, 21):
        other = model_P.copy()
        other[[3, 4, 5, 6], 0, [4, 5, 5, 6]] = q
        other_L_P = (visits * np.abs(mdp.P - other).sum(-1)).sum()
        assert other_L_P >= L_P - 1e-12


def test_out_of_trajectory_falls_without_and_improves_with_the_neighbourhood(tmp_path):
    rows = spi.out_of_trajectory(spi.Args(), tmp_path)
    result = {(name, epsilon): number for _, _, name, epsilon, number in rows}
    for epsilon in spi.Args().epsilons:
        assert result["V(unconstrained)", epsilon] < 0 < result["V(pi_b)", epsilon] < result["V(inside N^C)", epsilon]
        assert result["promised", epsilon] > 20
        assert result["L_R", epsilon] < 20 * epsilon
        assert result["L_P", epsilon] < epsilon


# ==== 3. The planning bound ====
def test_planning_bound_holds_inside_and_fails_outside():
    violations = {"inside": 0, "outside": 0}
    for case, side, _, pi in spi.trials(small_args(), np.random.default_rng(8), (12, 6, 3)):
        if side == "behaviour":
            V_b, V_model_b = case.values(pi, GAMMA)
            continue
        ratio = pi / case.pi_b
        inside = (ratio <= 1 / GAMMA + 1e-9).all() and (ratio >= 2 - 1 / GAMMA - 1e-9).all()
        assert inside == (side == "inside")
        V, V_model = case.values(pi, GAMMA)
        gap = case.mdp.start @ ((V - V_b) - (V_model - V_model_b)[case.phi])
        violations[side] += gap < -spi.zeta(case, 1 / GAMMA, GAMMA, V_model, V_model_b)
    assert violations["inside"] == 0
    assert violations["outside"] >= 10


def two_worst_cases(n_steps: int) -> dict[str, spi.Case]:
    """The script's chain, wrong in R̄; and one wrong in P̄: the last a_1 ends, the model says that it reaches a prize.

    The prize (worth 1, at position 1) makes K_V = 1 and W = 1: here, too, every step of the bound is an equality.
    """
    chain = spi.chain(n_steps)
    P = np.zeros((n_steps + 1, 2, n_steps + 1))
    P[1:, :, 1:] = chain.mdp.P
    R = np.zeros((n_steps + 1, 2))
    R[0] = 1
    model_P = P.copy()
    model_P[-1, 0, 0] = 1
    states = np.arange(n_steps + 1)
    mdp = spi.MDP(P, R, np.eye(n_steps + 1)[1])
    in_P = spi.Case(mdp, np.full((n_steps + 1, 2), 0.5), model_P, R, states, 1.0 + 10 * states)
    return {"reward": chain, "transition": in_P}


@pytest.mark.parametrize("n_steps", [1, 2, 10])
@pytest.mark.parametrize("wrong", ["reward", "transition"])
def test_value_gap_bound_is_an_equality_at_the_edge_and_fails_beyond(n_steps, wrong):
    case = two_worst_cases(n_steps)[wrong]
    for C, relation in ((1 / GAMMA, "equal"), (1.01 / GAMMA, "beyond"), (1.05, "inside")):
        V, V_model = case.values(np.tile([C / 2, 1 - C / 2], (len(case.pi_b), 1)), GAMMA)
        gap = abs(case.mdp.start @ (V - V_model))
        ratio = gap / spi.value_gap_bound(case, 1 / GAMMA, GAMMA, V_model)
        assert ratio == pytest.approx((GAMMA * C) ** n_steps, rel=1e-9)
        assert {"equal": abs(ratio - 1) < 1e-9, "beyond": ratio > 1.009, "inside": ratio < 0.96}[relation]


def test_zeta_counts_the_gap_of_the_behaviour_policy_as_well():
    case = spi.chain(3)
    V_model = case.values(case.pi_b, GAMMA)[1]
    expected = spi.value_gap_bound(case, 1.1, GAMMA, V_model) + spi.value_gap_bound(case, 1.0, GAMMA, V_model)
    assert spi.zeta(case, 1.1, GAMMA, V_model, V_model) == pytest.approx(expected)
    episode_length, L_R = 1 + 1 / 2 + 1 / 4, 1 / 8 / (1 + 1 / 2 + 1 / 4)
    assert expected == pytest.approx((1.1 + 1) * episode_length * L_R)


def test_bound_refuses_a_neighbourhood_that_is_too_large():
    with pytest.raises(ValueError, match=r"gamma \* C <= 1"):
        spi.value_gap_bound(spi.chain(2), 1.2, GAMMA, np.zeros(2))


def test_published_zeta_by_hand_on_a_chain():
    case = spi.chain(3)
    V_model = case.values(case.pi_b, GAMMA)[1]
    episode_length = 1 + 1 / 2 + 1 / 4  # and ℓ_R is 1 in the third step's a_1, which one episode in eight takes
    for SIR in (1.0, 1.05, 1.1):
        expected = 1 / 8 / GAMMA * (1 / (1 / SIR - GAMMA) + 1 / (1 - GAMMA))
        assert episode_length * case.mean_loss(0.0, GAMMA) == pytest.approx(1 / 8)  # no ℓ_P: K_V does not matter
        assert spi.published_zeta(case, SIR, GAMMA, V_model, V_model) == pytest.approx(expected)
    assert spi.published_zeta(case, 1 / GAMMA - 1e-9, GAMMA, V_model, V_model) > 1e6
    for SIR in (1 / GAMMA, 1.5):
        assert spi.published_zeta(case, SIR, GAMMA, V_model, V_model) == np.inf


def test_published_zeta_weighs_transitions_by_the_larger_lipschitz_constant():
    case = two_worst_cases(1)["transition"]  # a_1, half of the steps, ends; the model says that it reaches the prize
    V_model = case.values(case.pi_b, GAMMA)[1]
    steep = np.array([3.0, 0.0])  # K_V = 3 (from the end at 0 to the prize at 1), where that of V_model is 1
    ours, theirs = (spi.published_zeta(case, 1.0, GAMMA, V_model, V) for V in (V_model, steep))
    assert spi.lipschitz_constant(V_model, case.position) == 1
    assert ours == pytest.approx(1 / 2 * 2 / (1 - GAMMA)) and theirs == pytest.approx(3 * ours)


def test_our_constants_are_tighter_in_every_case_and_by_the_stated_factor():
    at_the_edge = []
    for case, side, _, pi in spi.trials(small_args(), np.random.default_rng(8), (12, 6, 3)):
        if side != "behaviour":
            continue
        for C in (1.01, 1.05, 1.1):
            found = spi.two_zetas(case, C, GAMMA)
            assert found["|real - model|"] < found["zeta"] < found["the paper's zeta"] / 5
        # Of π_b itself both are twice the bound of one policy: with one K_V their ratio is that of the document.
        V_model_b = case.values(pi, GAMMA)[1]
        zetas = [zeta(case, 1.0, GAMMA, V_model_b, V_model_b) for zeta in (spi.published_zeta, spi.zeta)]
        assert zetas[0] / zetas[1] == pytest.approx(1 / (GAMMA * (1 - GAMMA))) and 11.1 < zetas[0] / zetas[1] < 11.2
        at_the_edge.append(spi.two_zetas(case, 1 / GAMMA, GAMMA)["the paper's zeta"])
    assert np.isinf(at_the_edge).mean() > 0.9  # unless no action can be raised so far, as the others must be lowered


def test_the_document_states_the_two_zetas_of_the_script(tmp_path):
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\| (1[./][\dγ]+) \| (0\.\d+) \| (\d.*?) \| (\S+) \|$", text, re.MULTILINE)
    assert len(stated) == 5
    rows = spi.planning_bound(spi.Args(), tmp_path)
    found = {name: {x: y for _, _, which, x, y in rows if which == name} for name in ("|real - model|", "zeta")}
    published = {x: y for _, _, which, x, y in rows if which == "the paper's zeta"}
    for C, *numbers in stated:
        x = min(found["zeta"], key=lambda x: abs(x - (1 / GAMMA if C == "1/γ" else float(C))))
        computed = [found["|real - model|"][x], found["zeta"][x], published.get(x, np.inf)]
        expected = [np.inf if number == "infinite" else float(number) for number in numbers]
        assert computed == pytest.approx(expected, rel=0.01)


# ==== 4. The representation ====
@pytest.mark.parametrize("n_steps", [3, 10])
def test_pair_bound_is_an_equality_on_the_chain_where_the_episode_length_is_too_small(n_steps):
    case, C = spi.chain(n_steps), 1 / GAMMA
    V, V_model = case.values(np.tile([C / 2, 1 - C / 2], (n_steps, 1)), GAMMA)
    visits = spi.expected_visits(case.mdp, case.pi_b).sum(1)
    mean_gap = (visits @ np.abs(V - V_model)) / visits.sum()
    assert 2 * mean_gap == pytest.approx(spi.pair_bound(case, C, GAMMA, V_model), rel=1e-9)
    assert mean_gap > 1.5 * spi.value_gap_bound(case, C, GAMMA, V_model)  # that is C H_b (L_R + gamma K_V L_P)


@pytest.mark.parametrize("C", [1.05, 1 / GAMMA])
def test_share_of_pairs_above_never_exceeds_delta_inside(C):
    n_inside = 0
    for case, side, _, pi in spi.trials(small_args(bound_C=C), np.random.default_rng(9), (6,)):
        if side != "inside":
            continue
        n_inside += 1
        assert (pi <= C * case.pi_b + 1e-12).all()
        xi = spi.expected_visits(case.mdp, case.pi_b[case.phi]).sum(1)
        xi, z = xi / xi.sum(), case.position[case.phi]
        V, V_model = case.values(pi, GAMMA)
        bound = spi.pair_bound(case, C, GAMMA, V_model)
        assert 2 * xi @ np.abs(V - V_model[case.phi]) <= bound
        K_V = spi.lipschitz_constant(V_model, case.position)
        above = np.abs(V[:, None] - V) - K_V * np.abs(z[:, None] - z)
        for epsilon in np.geomspace(1e-3, 9):
            assert (np.outer(xi, xi)[above > epsilon]).sum() <= bound / epsilon
    assert n_inside == 75


# ==== The command line ====
def run_script(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "safe_policy_improvement.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("flags", "given", "allowed"),
    [
        (["--section", "magic"], "magic", "planning-bound"),
        (["--C", "2"], "2.0", "below 2"),
        (["--Cs", "1.5", "1"], "(1.5, 1.0)", "above 1"),
        (["--gamma", "0.5"], "0.5", "above 0.5"),
        (["--bound-C", "1.2"], "1.2", "1/gamma"),
        (["--bound-C", "0"], "0.0", "above 1"),
        (["--epsilon", "1"], "1.0", "below 1"),
        (["--epsilons", "0.1", "0"], "(0.1, 0.0)", "above 0"),
        (["--n-mdps", "0"], "0", "1 to 100,000,000"),
        (["--n-episodes", "10000000000000000000"], "10000000000000000000", "1 to 100,000,000"),
        (["--n-states", "1"], "1", "2 to"),
        (["--n-latents", "40", "41"], "(40, 41)", "--n-states"),
        (["--termination", "nan"], "nan", "0.01"),
    ],
)
def test_bad_input_gets_one_clear_line(flags, given, allowed, tmp_path):
    done = run_script(*flags, "--out-dir", str(tmp_path / "out"))
    assert done.returncode == 2
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{flags[0]}: got {given}, allowed: ") and allowed in lines[0]
    assert not (tmp_path / "out").exists()


def test_out_dir_that_is_a_file_gets_one_clear_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    done = run_script("--out-dir", str(file))
    assert done.returncode == 2
    assert (done.stdout + done.stderr).splitlines() == [f"--out-dir: got {file}, allowed: a folder, new or old"]
    done = run_script("--out-dir", f"{file}/below")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "can be made" in done.stderr
    assert file.read_text() == "kept"


SMALL = "--n-mdps 5 --n-learned 3 --n-states 8 --n-latents 8 4 --pair-latents 4 --n-rollouts 20 --n-episodes 2000"


def test_script_end_to_end_and_one_section_alone(tmp_path):
    done = run_script(*SMALL.split(), "--out-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    pictures = ("1_neighbourhood", "2_out_of_trajectory", "3_planning_bound", "4_representation")
    for picture in pictures:
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.reader((tmp_path / "all.csv").open()))
    assert rows[0] == ["section", "case", "quantity", "x", "value"]
    assert {row[0] for row in rows[1:]} == {"1", "2", "3", "4"}
    assert all(np.isfinite(float(row[4])) for row in rows[1:])

    alone = run_script(*SMALL.split(), "--section", "planning-bound", "--out-dir", str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    assert sorted(file.name for file in (tmp_path / "alone").iterdir()) == [
        "3_planning_bound.png",
        "planning-bound.csv",
    ]
    rows_alone = list(csv.reader((tmp_path / "alone" / "planning-bound.csv").open()))
    assert rows_alone[1:] == [row for row in rows[1:] if row[0] == "3"]
