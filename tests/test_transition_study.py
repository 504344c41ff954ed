"""The studies of P̄ and of the losses' places: what the variants compute, which runs are made, what the tables say."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import deep_spi_ppo
import deep_spi_ppo_atari
from benchmark.peers import deep_spi_ppo_atari_transition, deep_spi_ppo_transition
from benchmark.peers.transition_variants import SCRIPTS_SCALE
from benchmark.studies import atari_200k, confounding, placements, transition
from benchmark.suites import SUITES, TRANSITION_ARMS

PEERS = {deep_spi_ppo_transition: (deep_spi_ppo, (4, 2)), deep_spi_ppo_atari_transition: (deep_spi_ppo_atari, (6,))}


def latents_of(agent, rows=64):
    torch.manual_seed(5)
    vectors = isinstance(agent, deep_spi_ppo.Agent)
    obs = torch.randn(rows, 4) if vectors else torch.randint(256, (rows, 84, 84, 4), dtype=torch.uint8)
    noise = torch.randn(rows, *agent.transition_model.noise_shape).clamp(-1, 1)
    return agent.encode(obs), torch.randint(2, (rows,)), noise


# ==== P̄'s variants ====
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__.split(".")[-1])
def test_the_peer_without_its_flags_is_the_script(peer):
    script, sizes = PEERS[peer]
    torch.manual_seed(3)
    own = peer.Agent(*sizes, SCRIPTS_SCALE, False).state_dict()
    torch.manual_seed(3)
    expected = script.Agent(*sizes).state_dict()
    assert own.keys() == expected.keys()
    for name, value in own.items():
        assert torch.allclose(value, expected[name], atol=1e-7), name


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__.split(".")[-1])
def test_scale_and_residual_are_what_they_say(peer):
    """At the start the noise changes z̄' by about the scale; the residual form adds z, to rounding."""
    _, sizes = PEERS[peer]
    samples = {}
    for scale, residual in ((SCRIPTS_SCALE, False), (0.01, False), (0.01, True)):
        torch.manual_seed(3)
        agent = peer.Agent(*sizes, scale, residual)
        z, actions, noise = latents_of(agent)
        with torch.no_grad():
            samples[scale, residual] = (
                agent.transition_model(z, actions, noise),
                agent.transition_model(z, actions, 0 * noise),
            )
    spread = {key: float((sample - mean).std()) for key, (sample, mean) in samples.items()}
    # P̄'s own y varies about the bias: softplus of it too, by a factor of its exponential.
    assert spread[0.01, False] < 0.1 * spread[SCRIPTS_SCALE, False]
    assert spread[0.01, True] == pytest.approx(spread[0.01, False], rel=1e-3)
    torch.testing.assert_close(samples[0.01, True][1] - z, samples[0.01, False][1], atol=1e-5, rtol=1e-4)


def test_a_peer_trains_and_names_itself(tmp_path):
    args = deep_spi_ppo_transition.Args(
        transition_residual=True, transition_scale=0.02, num_envs=4, num_steps=8, total_timesteps=64,
        num_minibatches=2, device="cpu", run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    deep_spi_ppo_transition.train(args)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["script"] == "deep_spi_ppo_transition.py" and config["args"]["transition_residual"] is True
    with pytest.raises(SystemExit) as refused:
        replace(args, transition_scale=0.0)
    assert refused.value.code == 2


# ==== Which runs ====
def test_each_arm_changes_one_thing():
    for suite, script in (("transition", "deep_spi_ppo"), ("transition-pong", "deep_spi_ppo_atari")):
        algorithms = SUITES[suite].algorithms
        assert list(algorithms) == list(TRANSITION_ARMS) == list(transition.ARM_NAMES)
        assert algorithms["deep_spi"].script == f"{script}.py" and not algorithms["deep_spi"].flags
        assert algorithms["alpha-x100"].flags == {"transition_loss_coef": 0.05}
        assert {a.script for name, a in algorithms.items() if "residual" in name or "scale" in name} == {
            f"benchmark/peers/{script}_transition.py"
        }
    assert {task.env_id for suite in transition.STUDY for task in SUITES[suite].tasks} == set(transition.LATENT_SIZE)


def test_placements_have_ninety_runs_that_differ_by_their_place():
    runs = [args for _, args in placements.plan().values()]
    assert len(runs) == 90 and {args.method for args in runs} == {"additive", "deep_spi", "gated"}
    assert {args.loss_placement for args in runs} == {"additive", "utility", "gated"}
    assert {args.transition_loss_coef for args in runs} == {1.568, 1.0} and {args.n_path for args in runs} == {5, 10}


# ==== What the tables say ====
def test_tenths_are_medians_of_equal_parts():
    steps, values = np.arange(1, 31) * 100, np.arange(30.0)
    np.testing.assert_array_equal(transition.tenths(steps, values, 3000), np.arange(30.0).reshape(10, 3)[:, 1])
    assert np.isnan(transition.tenths(np.array([3000]), np.array([1.0]), 3000)[:-1]).all()


def row(arm, seed, ratio, last):
    columns = dict.fromkeys(("transition_sampled", "transition_mean", "transition_copy", "reward", "reward_zero"), 0.5)
    key = {"suite": "transition", "arm": arm, "task": "CartPole-v1", "seed": seed, "steps": 1000}
    return [key | {"tenth": i + 1, "ratio": ratio, "last_100": last} | columns for i in range(10)]


def test_the_table_has_geometric_means_and_welchs_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(transition, "FILE", tmp_path / "transition.csv")
    rows = [
        *(r for seed, last in enumerate((400, 450, 500), 1) for r in row("deep_spi", seed, 2.0, last)),
        *(r for seed, ratio in enumerate((0.5, 1.0, 2.0), 1) for r in row("residual", seed, ratio, 480 + seed)),
    ]
    with open(transition.FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    published, residual = transition.transition_table().splitlines()[2:]
    assert "| published | 3 | 0.5 | 0.5 | 0.5 | 2.00 | 450.0 |" in published
    # log ratios -ln 2, 0, ln 2: mean 0, half width t(2) ln 2 / √3
    half = np.exp(4.302653 * np.log(2) / 3**0.5)
    assert f"| 1.00 [{1 / half:.2f}, {half:.2f}] | 482.0 | +32.0 [" in residual
    assert transition.reward_table().splitlines()[2] == "| CartPole-v1 | 1,000 | 3 | 0.5 | 0.5 | 1.00 |"


def test_a_run_gives_ten_rows_per_dimension_and_replaces_its_older_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(transition, "FILE", tmp_path / "transition.csv")
    run_dir = tmp_path / "runs" / "transition" / "deep_spi" / "CartPole-v1" / "1"
    with pytest.raises(SystemExit):
        transition.collect(tmp_path / "runs")
    args = deep_spi_ppo.Args(
        num_envs=4, num_steps=8, total_timesteps=32 * 20, num_minibatches=2, device="cpu", run_dir=str(run_dir)
    )
    deep_spi_ppo.train(args)
    (run_dir / "done.json").write_text("{}")
    for _ in range(2):
        assert transition.collect(tmp_path / "runs") == 1
        seeds = transition.runs("transition", "CartPole-v1", "deep_spi")
        assert list(seeds) == [1] and [int(r["tenth"]) for r in seeds[1]] == list(range(1, 11))
    logged = transition.read_events(run_dir)["world_model/transition_loss_copy"][1].reshape(10, 2)
    written = [float(r["transition_copy"]) * 32 for r in seeds[1]]
    np.testing.assert_allclose(written, np.median(logged, axis=1), rtol=1e-4)


def test_placements_table_pairs_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(placements, "FOLDER", tmp_path)
    values = {"additive": 3.0, "deep_spi": 2.0, "gated": 1.0}
    for _, args in placements.plan().values():
        if args.seed <= 3:
            numbers = dict.fromkeys(confounding.NUMBERS, 1.0)
            numbers[placements.PRIMARY] = values[args.method] + (args.seed if args.method == "gated" else 0)
            versions = {"versions": "", "git_commit": ""}
            record = confounding.settings_of(args) | numbers | versions
            confounding.append_row(tmp_path / "runs.csv", confounding.RUN_COLUMNS, record)
    lines = placements.table().splitlines()[2:]
    assert len(lines) == 3 and all("| 3 |" in line for line in lines)
    # gated: 2, 3, 4; Deep SPI 2, 2, 2; the pairs' differences 0, 1, 2: mean 1, half width t(2) / √3 = 2.48
    assert "| 1.00 [-1.48, 3.48], less in 0 of 3 | 0.00 [-2.48, 2.48], less in 1 of 3 |" in lines[0]
    placements.draw()
    assert (tmp_path / "placements.png").stat().st_size > 10_000


def test_atari_table_has_the_transition_loss_per_dimension():
    table = atari_200k.table()
    line = next(line for line in table.splitlines() if "Pong-v5 | `deep_spi_ppo_atari.py`" in line)
    assert "| 0.00683 → 0.00517 |" in line  # 21.42 and 16.21 over 3,136
    assert "| 0.00136 → 0.000461 |" in next(line for line in table.splitlines() if "Pong-v5 | `deepmdp" in line)
