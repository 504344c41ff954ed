"""The study of parallelism: what it keeps of a run, its tables by hand, and that its suites are the protocol's."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmark.common import read_events, read_table
from benchmark.peers import deep_spi_ppo_coverage
from benchmark.report.scores import FINAL, LAST
from benchmark.studies import parallelism
from benchmark.suites import SUITES

TASK = "LunarLander-v3-sticky0.25"


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(parallelism, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(parallelism, "FILE", tmp_path / "parallelism.csv")


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_a_run_is_kept_with_medians_of_tenths_and_losses_per_dimension(tmp_path):
    run_dir = tmp_path / "runs" / "parallelism-lunar" / "deep_spi-8x128" / TASK / "1"
    shape = {"num_envs": 2, "num_steps": 8, "total_timesteps": 320, "num_minibatches": 1, "update_epochs": 1}
    deep_spi_ppo_coverage.train(
        deep_spi_ppo_coverage.Args(env_id="LunarLander-v3", run_dir=str(run_dir), device="cpu", **shape)
    )
    (run_dir / "done.json").write_text(json.dumps({"steps": 320, "minutes": 1.0, "sps": 10.0}))
    (tmp_path / "runs" / "parallelism-pong" / "ppo-8x128" / "Pong-v5-plain" / "1").mkdir(parents=True)  # unfinished
    for _ in range(2):
        assert parallelism.collect(tmp_path / "runs") == 1
        written = read_table(parallelism.FILE)
        assert [int(row["tenth"]) for row in written] == list(range(1, 11))
    events = read_events(run_dir)
    for name, size in ("transition_copy", 32), ("distinct", 1), ("latent_variance", 1):
        logged = np.median(events[parallelism.METRICS[name]][1].reshape(10, 2), axis=1) / size
        np.testing.assert_allclose([float(row[name]) for row in written], logged, rtol=1e-4)


def write(file, runs):
    """Rows of the study's file: arm → seed → (distinct, two variances, the four losses), in every tenth."""
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow([*parallelism.KEY, "tenth", *parallelism.METRICS])
        for arm, seeds in runs.items():
            for seed, values in enumerate(seeds, start=1):
                writer.writerows(["parallelism-lunar", arm, TASK, seed, i, *values] for i in range(1, 11))


def test_tables(monkeypatch):
    scores = {
        "ppo-8x128": {FINAL: np.array([10.0, 20.0, 30.0]), LAST: np.array([1.0, 1.0, 1.0])},
        "ppo-128x8": {FINAL: np.array([40.0, 50.0, 60.0]), LAST: np.array([1.0, 2.0, 3.0])},
        "deep_spi-8x128": {FINAL: np.array([0.0]), LAST: np.array([5.0])},
    }
    monkeypatch.setattr(parallelism, "scores_of", lambda suite: {TASK: scores} if suite == "parallelism-lunar" else {})
    ppo, other = (
        [(share, variance, 2, "", "", "", "") for share, variance in runs]
        for runs in (((0.5, 3), (0.6, 4), (0.7, 5)), ((0.5, 7), (0.6, 8), (0.55, 9)))
    )
    write(
        parallelism.FILE,
        {"ppo-8x128": ppo, "ppo-128x8": other, "deep_spi-8x128": [(1, 9, 0.25, 0.02, 0.01, 0.3, 0.4)]},
    )
    first, second, third = rows(parallelism.score_table())
    # Student's t with two degrees of freedom: 4.3027 x 10 / √3 = 24.8
    assert first[:7] == [TASK, "PPO", "8 × 128", "3", "20.0 [-4.8, 44.8]", "1.0", "0.600 → 0.600"]
    assert first[7:] == ["4 → 4", "2 → 2", "", ""] and second[6] == "0.550 → 0.550"
    assert third[1:] == [
        "Deep SPI", "8 × 128", "1", "0.0", "5.0", "1.000 → 1.000", "9 → 9", "0.25 → 0.25", "0.02 : 0.01", "0.3 : 0.4"
    ]  # fmt: skip
    (row,) = rows(parallelism.difference_table())  # Deep SPI has one shape
    # equal spreads: four degrees of freedom, 2.7764 x 10 x √(2/3) = 22.7; at 97.5 %, 3.4954 x 10 x √(2/3) = 28.5
    assert row[1:5] == ["PPO, 128 × 8 − 8 × 128", "3, 3", "+30.0 [+7.3, +52.7]", "+30.0 [+1.5, +58.5]"]
    assert row[6] == "+4 [+1.7, +6.3]"  # 2.7764 x 1 x √(2/3) = 2.27


def test_every_second_policy_of_each_run(monkeypatch):
    def run(algorithm, task, seed):
        return SimpleNamespace(algorithm=algorithm, task=task, seed=seed, policies=policies)

    policies = {200: np.array([1.0, 2.0, 3.0]), 100: np.array([9.0]), 400_000: np.array([-21.0, -21.0]), 300: None}
    runs = [run(*key) for key in (("ppo-128x8", "sticky", 1), ("ppo-128x8", "plain", 2), ("ppo-8x128", "plain", 1))]
    monkeypatch.setattr(parallelism, "runs_of", {"parallelism-pong": runs}.get)
    table = parallelism.policy_table()
    assert table.splitlines()[0] == "| task | algorithm | N × T | seed | 0.0 M | 0.4 M |"
    # Student's t with two degrees of freedom: 4.3027 / √3 = 2.5; games that all end alike have no interval
    scores = ["2.0 [-0.5, 4.5]", "-21.0"]
    assert rows(table) == [
        ["plain", "PPO", "8 × 128", "1", *scores],
        ["plain", "PPO", "128 × 8", "2", *scores],
        ["sticky", "PPO", "128 × 8", "1", *scores],
    ]


def test_no_runs_are_no_tables(tmp_path):
    assert parallelism.score_table() == parallelism.difference_table() == parallelism.policy_table() == "None yet."
    with pytest.raises(SystemExit):
        parallelism.collect(tmp_path)


def test_the_suites_are_the_protocol_s():
    lunar, pong = (SUITES[name] for name in parallelism.STUDY)
    assert lunar.algorithms.keys() == {name for *_, name in parallelism.arms()} and lunar.seeds == 5
    assert pong.algorithms.keys() == {name for name in lunar.algorithms if "32x32" not in name}
    assert [task.flags for task in pong.tasks] == [{}, {"repeat_action_probability": 0.0, "noop_max": 30}]
    assert [task.label for task in lunar.tasks] == [TASK]
