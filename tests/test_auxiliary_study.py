"""The study of auxiliary losses: what it keeps of each kind, its tables by hand, and that it is the protocol's."""

import json

import numpy as np
import pytest

import dbc_ppo_atari
import ppo_baseline
import spr_ppo_atari
from benchmark.common import read_events, read_table
from benchmark.report.scores import FINAL, LAST
from benchmark.studies import auxiliary, by_tenths
from benchmark.suites import SUITES

SMALL = {"env_id": "Krull-v5", "total_timesteps": 2 * 8 * 10, "num_envs": 2, "num_steps": 8, "num_minibatches": 1}
SMALL |= {"update_epochs": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(auxiliary, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(auxiliary, "FILE", tmp_path / "auxiliary_losses.csv")


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_runs_are_kept_with_the_losses_that_they_have(tmp_path):
    folder = tmp_path / "runs" / "auxiliary"
    for name, script in {"ppo": ppo_baseline, "spr": spr_ppo_atari, "dbc": dbc_ppo_atari}.items():
        run_dir = folder / name / "Krull-v5" / "1"
        script.train(script.Args(**SMALL, run_dir=str(run_dir)))
        (run_dir / "done.json").write_text(json.dumps({"steps": 160, "minutes": 1.0, "sps": 10.0}))
    for _ in range(2):
        assert auxiliary.collect(folder) == 3
        written = read_table(auxiliary.FILE)
        assert [(row["algorithm"], int(row["tenth"])) for row in written] == [
            (name, i) for name in ("dbc", "ppo", "spr") for i in range(1, 11)
        ]
    logged = read_events(folder / "spr" / "Krull-v5" / "1")["world_model/spr_loss"][1]
    np.testing.assert_allclose([float(row["spr"]) for row in written[20:]], logged, rtol=1e-4)
    ppo, spr, dbc = rows(auxiliary.loss_table())
    numbers = [[cell.count(" : ") + bool(cell) for cell in row[3:]] for row in (ppo, spr, dbc)]
    assert numbers == [[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 3, 0, 1, 1, 1], [2, 1, 2, 0, 2, 1, 1, 1]]
    entropy = read_events(folder / "ppo" / "Krull-v5" / "1")["losses/entropy"][1][-1]
    assert ppo[-1] == f"{entropy:.2f}"
    names = ("spr_loss", "spr_loss_copy", "spr_loss_mean")
    logged = [read_events(folder / "spr" / "Krull-v5" / "1")[f"world_model/{name}"][1][-1] for name in names]
    assert spr[6] == " : ".join(f"{value:.2g}" for value in logged)
    assert auxiliary.deepmdp_table() == "None yet." == auxiliary.difference_table()
    assert len(rows(auxiliary.score_table())) == 3


def test_tables(monkeypatch):
    scores = {name: {LAST: np.array([1.0, 2.0, 3.0])} for name in ("ppo", "spr-none", "spr", "deep_spi")}
    scores["ppo"][FINAL], scores["spr-none"][FINAL] = np.array([10.0, 20.0, 30.0]), np.array([0.0, 10.0, 20.0])
    scores["spr"][FINAL], scores["deep_spi"][FINAL] = np.array([40.0, 50.0, 60.0]), np.array([7.0])
    monkeypatch.setattr(auxiliary, "scores", lambda: {"Krull-v5": scores})
    assert [row[1] for row in rows(auxiliary.score_table())] == ["PPO", "Deep SPI", "SPR's network, no loss", "SPR"]
    first, second = rows(auxiliary.difference_table())  # Deep SPI has one seed
    # equal spreads: four degrees of freedom, 2.7764 x 10 x √(2/3) = 22.7
    assert first[:4] == ["Krull-v5", "SPR − SPR's network, no loss", "3, 3", "+40.0 [+17.3, +62.7]"]
    assert second[:4] == ["Krull-v5", "SPR − PPO", "3, 3", "+30.0 [+7.3, +52.7]"]


def test_figure_7_compares_deep_spi_and_deepmdp():
    losses = {"deep_spi": (0.1, 0.3), "deepmdp": (0.4, 0.6)}
    by_tenths.add(
        auxiliary.FILE,
        [
            {"algorithm": name, "task": "Krull-v5", "seed": seed, "tenth": i}
            | dict.fromkeys(auxiliary.METRICS, "")
            | {"reward": values[seed - 1] / i}
            for name, values in losses.items()
            for seed in (1, 2)
            for i in range(1, 11)
        ],
    )
    table = rows(auxiliary.deepmdp_table())
    assert [row[1] for row in table] == ["1 of 10", "2 of 10", "5 of 10", "10 of 10"]
    # two degrees of freedom: 4.3027 x √(0.02/2 + 0.02/2) = 0.608
    assert table[0][2:] == ["L_R", "2, 2", "0.2", "0.5", "-0.3 [-0.91, +0.31]"]


def test_what_the_protocol_compares_is_in_the_suite():
    names = {name for pair in auxiliary.COMPARISONS for name in pair}
    assert names == set(SUITES["auxiliary"].algorithms) == set(auxiliary.NAMES)
    assert len(auxiliary.COMPARISONS) == len(set(auxiliary.COMPARISONS)) == 14
