"""The study of DreamSPI on vectors: its rows, what decides, its tables and pictures."""

import csv
import shutil
from itertools import pairwise

import numpy as np
import pytest

import dream_spi
from benchmark.studies import control, planning
from benchmark.suites import CLIPS, HORIZONS, PLANNING, SUITES


def row(task, clip, horizon, seed, **values):
    """A row of suite `planning`; what is not given is 1."""
    key = {"suite": "planning", "arm": f"clip{clip:g}-h{horizon}", "task": task, "seed": seed, "steps": 1000}
    numbers = dict.fromkeys(("last_100", "mean", "fall", "relative_error", *planning.MEASURES), 1.0)
    return key | numbers | values


def write(rows):
    with open(planning.FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "FILE", tmp_path / "planning.csv")
    return tmp_path


def test_longer_runs_have_every_seed_and_say_who_solves(own_file):
    key = {"suite": "planning-longer", "arm": "dream_spi-h15", "horizon": 15, "steps": 397_312}
    write(
        [row("CartPole-v1", 0.1, 15, seed, last_100=last) | key for seed, last in enumerate((500, 474, 475), start=1)]
    )
    *_, line = planning.longer_table().splitlines()
    # Student's t with two degrees of freedom, of the standard deviation 14.73: ± 36.6
    start = "| CartPole-v1 | 15 | 397,312 | 475 | 483.0 [446.4, 519.6] | 500, 474, 475 | 2 of 3 |"
    assert line.startswith(start) and planning.longer_table().count("\n") == 2


def test_horizons_are_compared_in_as_many_steps(own_file):
    longer = {"suite": "planning-longer", "horizon": 8, "steps": 2000}
    short = {"CartPole-v1": (1, 2, 3), "Acrobot-v1": (1, 2, 3), "LunarLander-v3": (90, 91, 92)}  # the last is not it
    rows = [
        row(task, 0.1, 15, seed, last_100=last + shift) | longer | {"arm": arm}
        for task, own in short.items()
        for arm, shift in {"dream_spi": 0, "dream_spi-h15": 4}.items()
        for seed, last in enumerate(own, start=1)
        if (task, arm) != ("LunarLander-v3", "dream_spi")
    ]
    control_rows = [row("LunarLander-v3", 0.1, 8, seed, last_100=80 + seed) for seed in (1, 2, 3)]
    write(rows + [own | {"suite": "control", "arm": "dream_spi"} for own in control_rows])
    cartpole, acrobot, lander = planning.horizons_table().splitlines()[2:]
    # equal spreads: four degrees of freedom, 2.7764 √(2/3) = 2.267; t = 4 / √(2/3) has p 0.008
    assert cartpole.startswith("| CartPole-v1 | 2,000 | 3, 3 | +4.0 [+1.7, +6.3], p 0.008 | ")
    assert acrobot.removeprefix("| Acrobot-v1") == cartpole.removeprefix("| CartPole-v1")
    assert lander.startswith("| LunarLander-v3 | 1,000 | 3, 3 | +13.0 [+10.7, +15.3], p 0.000 | ")


def test_every_cell_is_planned_and_differs_only_by_clip_and_horizon():
    algorithms = SUITES["planning"].algorithms
    assert {tuple(a.flags.values()) for a in algorithms.values()} == {(c, h) for c in CLIPS for h in HORIZONS}
    assert {a.script for a in algorithms.values()} == {PLANNING["dream_spi"].script} and not PLANNING["dream_spi"].flags
    default = dream_spi.Args()
    assert algorithms["clip0.1-h8"].flags == {
        "imagination_clip_coef": default.imagination_clip_coef,
        "horizon": default.horizon,
    }
    assert min(CLIPS) == pytest.approx(1 / default.gamma - 1, rel=0.02)  # the theorem's


def test_a_fall_is_below_an_earlier_value():
    assert planning.fall(np.array([0.0, 1.0, 0.25, 0.75, 0.5])) == 0.75
    assert planning.fall(np.array([0.0, 0.5, 2.0])) == 0


def test_the_outcome_pairs_seeds_and_averages_over_tasks(own_file):
    falls = {0.01: (0.1, 0.2, 0.3), 0.1: (0.2, 0.5, 0.5)}  # of Acrobot 0.2 more each, which leaves the differences
    write(
        [
            row(task, clip, 8, seed, fall=value + 0.2 * (task != "CartPole-v1"))
            for task in planning.TASKS
            for clip, values in falls.items()
            for seed, value in enumerate(values, start=1)
        ]
    )
    # differences -0.1, -0.3, -0.2: mean -0.2, half width t(2) 0.1 / √3 = 0.248
    assert planning.outcome() == "-0.20 [-0.45, +0.05], 3 seeds"


def test_the_outcome_is_of_the_seeds_that_have_both(own_file):
    def falls(clip, seeds):
        return [row(task, clip, 8, seed, fall=float(seed)) for task in planning.TASKS for seed in seeds]

    write(falls(0.01, (1, 2, 3, 4)) + falls(0.1, (3, 4, 5)))
    assert planning.outcome() == "+0.00, 2 seeds"  # 3 and 4, which differ by nothing


def test_the_table_has_every_cell(own_file):
    write(
        [
            row(
                task, clip, horizon, seed, mean=horizon / 10, last_100=500 if seed < 3 else -500, relative_error=0.5
            )
            for task in planning.TASKS
            for clip in CLIPS
            for horizon in HORIZONS
            for seed in (1, 2, 3)
        ]
    )  # fmt: skip
    lines = planning.planning_table().splitlines()[2:]
    assert len(lines) == 12
    assert lines[0].startswith("| 0.01 | 1 | 167; 2 of 3 | 167; 2 of 3 | 0.10")
    assert lines[0].endswith("| 1.00 | 0.50 | 1 | 1 | 1.00 | 1.00 |")
    assert lines[-1].startswith("| 0.3 | 15 |") and "| 1.50" in lines[-1]


def test_a_run_gives_a_row_and_replaces_its_older_one(own_file):
    with pytest.raises(SystemExit):
        planning.collect(own_file / "runs")
    run_dir = own_file / "runs" / "planning" / "clip0.3-h4" / "CartPole-v1" / "7"
    args = dream_spi.Args(
        num_envs=8, num_steps=16, total_timesteps=128 * 10, horizon=4, imagination_clip_coef=0.3, seed=7, device="cpu",
        run_dir=str(run_dir),
    )  # fmt: skip
    dream_spi.train(args)
    (run_dir / "done.json").write_text("{}")
    sticky = own_file / "runs" / "control" / "dream_spi" / "CartPole-v1-sticky0.25" / "7"
    shutil.copytree(run_dir, sticky)
    assert planning.collect(own_file / "runs") == 2  # of two tasks, as their folders say
    assert [found["task"] for found in planning.read_table(planning.FILE)] == ["CartPole-v1-sticky0.25", "CartPole-v1"]
    shutil.rmtree(sticky)
    planning.FILE.unlink()
    for _ in range(2):
        assert planning.collect(own_file / "runs") == 1
        (written,) = planning.read_table(planning.FILE)
    assert (written["seed"], written["clip"], written["horizon"], written["steps"]) == ("7", "0.3", "4", "1280")
    logged = planning.read_events(run_dir)["imagination/return_error"][1]
    size = abs(np.median(planning.read_events(run_dir)["imagination/real_return"][1]))
    assert float(written["relative_error"]) == pytest.approx(np.median(logged) / size, rel=1e-4)
    assert len(logged) == 10 and float(written["return_error"]) == pytest.approx(np.median(logged), rel=1e-4)
    episodes = planning.read_episodes(run_dir)
    assert float(written["last_100"]) == pytest.approx(episodes[-100:, 1].mean(), rel=1e-4)
    edges = np.linspace(0, 1280, 51)
    means = [episodes[(episodes[:, 0] > a) & (episodes[:, 0] <= b), 1] for a, b in pairwise(edges)]
    curve = (np.array([own.mean() for own in means if len(own)]) - 22.6) / (475 - 22.6)
    assert float(written["mean"]) == pytest.approx(curve.mean(), rel=1e-4)


def test_curves_of_the_control_tasks_are_of_the_algorithms_asked_for():
    assert {name for own in control.curves(("ppo",)).values() for name in own} == {"ppo"}
