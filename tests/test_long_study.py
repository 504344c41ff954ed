"""The study of long runs: what it keeps of a run, and its tables by hand."""

import csv
import json

import numpy as np
import pytest

import deep_spi_ppo_atari
import deepmdp_ppo_atari
import ppo_baseline
from benchmark.common import read_events, read_table
from benchmark.studies import long

SMALL = {"env_id": "Pong-v5", "total_timesteps": 2 * 8 * 20, "num_envs": 2, "num_steps": 8, "num_minibatches": 1}
SMALL |= {"update_epochs": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(long, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(long, "FILE", tmp_path / "long_losses.csv")
    monkeypatch.setattr(long, "UNFINISHED", tmp_path / "unfinished")
    monkeypatch.setattr(long, "RESULTS", tmp_path)


def finish(run_dir, games, on_the_way):
    """What the launcher adds to a run: returns of the final policy, and of one on the way."""
    (run_dir / "done.json").write_text(json.dumps({"steps": 320, "minutes": 1.0, "sps": 10.0}))
    played(run_dir, "evaluation", [], games)
    played(run_dir, "policies", [160], on_the_way)


def played(run_dir, name, first, returns):
    """Games of policies of a run, sampled; `first`: the step of a policy on the way."""
    with open(run_dir / f"{name}.csv", "w", newline="") as file:
        head = ["global_step"] if first else []
        csv.writer(file).writerows([[*head, "policy", "return", "length", "ended"]])
        csv.writer(file).writerows([[*first, "sampled", value, 100, "True"] for value in returns])


def test_runs_are_kept_with_their_losses_per_dimension(tmp_path):
    folder = tmp_path / "runs" / "long"
    scripts = {"ppo": ppo_baseline, "deep_spi": deep_spi_ppo_atari, "deepmdp": deepmdp_ppo_atari}
    for name, script in scripts.items():
        run_dir = folder / name / "Pong-v5" / "1"
        script.train(script.Args(**SMALL, run_dir=str(run_dir)))
        finish(run_dir, [-21, -19], [-20, -14])
    for _ in range(2):
        assert long.collect(folder) == 3
        rows = read_table(long.FILE)
        assert [(row["algorithm"], int(row["tenth"])) for row in rows] == [
            (name, i) for name in ("deep_spi", "deepmdp") for i in range(1, 11)
        ]
    for name, size in (("deep_spi", 7 * 7 * 64), ("deepmdp", 1)):  # a sum over the latent, and a mean
        logged = read_events(folder / name / "Pong-v5" / "1")["world_model/transition_loss_copy"][1].reshape(10, 2)
        written = [float(row["transition_copy"]) for row in rows if row["algorithm"] == name]
        np.testing.assert_allclose(written, np.median(logged, axis=1) / size, rtol=1e-4)
    assert len(long.loss_table().splitlines()) == 4
    lines = long.score_table().splitlines()[2:]
    # Student's t with one degree of freedom: 12.706 x 1; the policy on the way is the better one
    assert all("| -20.0 [-32.7, -7.3], 2 games | -17.0 [-55.1, 21.1] at 0.0 M |" in line for line in lines)
    assert all(line.endswith("| -20.7 | 14.6 | 0.0 |") for line in lines) and len(lines) == 3
    long.draw()
    assert (tmp_path / "long.png").stat().st_size > 10_000


def test_an_unfinished_run_is_kept_with_its_policies_until_it_is_finished(tmp_path):
    folder = tmp_path / "runs" / "long"
    run_dir = folder / "deep_spi" / "Pong-v5" / "1"
    args = deep_spi_ppo_atari.Args(**SMALL, run_dir=str(run_dir))
    deep_spi_ppo_atari.train(args)
    config = json.loads((run_dir / "config.json").read_text())
    config["args"]["total_timesteps"] = 1600  # so its 320 steps are two tenths
    (run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="no finished run"):
        long.collect(folder)  # it has no games to show
    with open(run_dir / "policies.csv", "w", newline="") as file:
        csv.writer(file).writerows([["global_step", "policy", "return", "length", "ended"]])
        csv.writer(file).writerows([step, "sampled", value, 9, 1] for step in (160, 320) for value in (-21, -19))

    assert long.collect(folder) == 0
    (curve,) = long.curves()
    assert not curve.finished and {step: list(own) for step, own in curve.policies.items()} == {
        160: [-21, -19],
        320: [-21, -19],
    }
    assert long.policies_table().splitlines()[0] == "| steps | Pong, Deep SPI, seed 1, unfinished |"
    rows = read_table(long.FILE)
    logged = read_events(run_dir)["world_model/reward_loss"][1].reshape(2, 10)
    np.testing.assert_allclose([float(row["reward"]) for row in rows], np.median(logged, axis=1), rtol=1e-4)
    assert "| 2 of 10 |" in long.loss_table()
    kept = json.loads((tmp_path / "unfinished" / "deep_spi" / "Pong-v5" / "1" / "config.json").read_text())
    assert "script_path" not in kept and str(tmp_path) not in json.dumps(kept)
    long.draw()

    finish(run_dir, [-21, -19], [-20, -14])
    assert long.collect(folder) == 1
    (curve,) = long.curves()
    assert curve.finished and list(curve.policies) == [160, 320]
    assert len(read_table(long.FILE)) == 10 and "unfinished" not in long.policies_table()


def test_policies_of_a_tenth_share_a_row_and_rows_are_in_order_of_steps(monkeypatch):
    games = np.array([1.0, 1.0])
    runs = [
        long.Curve("ppo", "Pong-v5", 1, {1_996_800: games, 10_000_384: games}, True),
        long.Curve("deepmdp", "Pong-v5", 1, {2_009_600: games}, False),
    ]
    monkeypatch.setattr(long, "curves", lambda: runs)
    assert long.policies_table().splitlines()[2:] == ["| 2.0 M | 1.0 | 1.0 |", "| 10.0 M | 1.0 |  |"]
