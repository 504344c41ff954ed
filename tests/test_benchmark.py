"""Tables and pictures: what README shows is what the committed results say."""

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmark import common
from benchmark.launch import keep
from benchmark.launch.plan import PlannedRun, settings_of
from benchmark.launch.worker import find, log_path
from benchmark.report import collect, figures, learning_curve
from benchmark.report.runs import read_known_scores
from benchmark.studies import pilot
from benchmark.suites import ATARI5_GAMES, PILOT_GAMES

ROOT = Path(__file__).parent.parent


def test_tables_are_regenerated_to_the_same_text():
    texts = [document.read_text() for document in figures.DOCUMENTS]
    assert sum(text.count("<!-- table:") for text in texts) == len(figures.TABLES)
    assert [figures.with_tables(text) for text in texts] == texts


def test_the_five_games_are_those_that_the_pilot_shows_to_be_learned_earliest():
    rows = [row.split(" | ")[0].removeprefix("| ") for row in pilot.table().splitlines()[2:]]
    assert sorted(rows) == sorted(PILOT_GAMES)
    assert sorted(rows[:5]) == ATARI5_GAMES


def test_the_authors_scores_come_to_what_sorting_them_gives():
    """The IQM by hand: of sorted scores, a quarter (rounded down) is left out at either end."""
    known = read_known_scores().values()
    for line, games in zip(
        pilot.authors_table().splitlines()[2:], (known, [g for g in known if g["published_ppo"] != 0]), strict=True
    ):
        scores = sorted((g["published_ppo"] - g["random"]) / (g["human"] - g["random"]) for g in games)
        cut = len(scores) // 4
        middle = scores[cut : len(scores) - cut]
        gap = sum(max(0, 1 - x) for x in scores) / len(scores)
        numbers = (sum(middle) / len(middle), scores[len(scores) // 2], sum(scores) / len(scores), gap)
        assert line.endswith(f"| {len(scores)} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |")


def test_interval_is_students():
    """By the table of t: 4.303 for two degrees of freedom, of a mean whose standard error is 1 / sqrt(3)."""
    low, high = common.mean_interval(np.array([[4.0, 1.0], [5.0, 1.0], [6.0, 1.0]]))
    assert (low[0], high[0]) == pytest.approx((5 - 4.303 / 3**0.5, 5 + 4.303 / 3**0.5), abs=1e-3)
    assert low[1] == high[1] == 1.0
    assert np.isnan(common.mean_interval(np.array([3.0]))).all()


@pytest.mark.parametrize("seeds", [3, 10])
def test_interval_covers_the_mean_in_95_of_100_cases(seeds):
    samples = np.random.default_rng(0).normal(5, 2, (seeds, 4000))
    low, high = common.mean_interval(samples)
    assert ((low < 5) & (high > 5)).mean() == pytest.approx(0.95, abs=0.015)  # four standard errors


def test_parts_average_what_lies_in_them():
    steps, values = np.array([1, 5, 10, 11, 40]), np.array([1.0, 2.0, 6.0, 5.0, 7.0])
    assert common.parts(steps, values, 40, 4) == [(10, 3.0), (20, 5.0), (40, 7.0)]


def test_running_mean():
    assert common.running_mean(np.array([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [1.0, 1.5, 2.5, 3.5]


def test_unfinished_runs_are_not_collected(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"args": {}}))
    assert collect.collect(tmp_path, tmp_path / "out") == 0
    assert not (tmp_path / "out.csv").exists()


def test_learning_curve_of_a_run_without_episodes_is_refused(tmp_path):
    (tmp_path / "episodes.csv").write_text("global_step,return,length\n")
    with pytest.raises(SystemExit) as refused:
        learning_curve.draw(tmp_path)
    assert refused.value.code == 2


def test_kept_runs_are_small_and_still_finished(tmp_path, capsys):
    """Without weights and without a path of the machine; to the launcher, put back, they are finished runs.

    A run whose policies are still playing is left out: one with a policy that has not played, one that is being made.
    """
    run = PlannedRun("deep_spi", "CartPole-v1", "CartPole-v1", 1, "deep_spi_ppo.py", {}, 8192)
    settings = settings_of(run)
    run_dir = tmp_path / "suite" / run.name
    run_dir.mkdir(parents=True)
    args = settings | {"runs_dir": str(tmp_path), "run_name": "1", "track": False}
    config = {"script": "deep_spi_ppo.py", "script_path": str(tmp_path / "deep_spi_ppo.py"), "args": args}
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "done.json").write_text(json.dumps({"steps": 8192, "minutes": 1.0, "sps": 100.0}))
    (run_dir / "episodes.csv").write_text("global_step,return,length\n64,9.0,9\n")
    (run_dir / "agent.pt").write_bytes(b"weights")
    (run_dir / "evaluation.csv").write_text("policy,return,length,ended\nsampled,9.0,9,1\n")
    (run_dir / "policies.csv").write_text("global_step,policy,return,length,ended\n64,sampled,9.0,9,1\n")
    (tmp_path / "suite" / "plan.json").write_text("[]")
    (run_dir.parent / "2").mkdir()  # an unfinished one
    for seed in "34":
        shutil.copytree(run_dir, run_dir.with_name(seed))
    (run_dir.with_name("3") / "policies").mkdir()
    (run_dir.with_name("3") / "policies" / "128.pt").write_bytes(b"weights")
    with open(log_path(run_dir.with_name("4")), "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert keep.keep(tmp_path / "suite", tmp_path / "kept") == [run_dir]
    assert [line.split()[0][-1] for line in capsys.readouterr().err.splitlines()] == ["3", "4"]
    kept = tmp_path / "kept"
    files = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())
    tables = ("episodes.csv", "evaluation.csv", "policies.csv")
    names = [f"{run.name}/{name}" for name in ("config.json", "done.json", *tables)]
    assert files == [*names, "plan.json", "plan.json.lock"]
    assert not [path for path in files if str(tmp_path) in (kept / path).read_text()]
    assert keep.keep(kept, tmp_path / "back") == [kept / run.name]
    assert find(tmp_path / "back" / run.name, run, settings).state == "finished"


def make_kept_run(suite, config, episodes):
    run_dir = suite / "deep_spi" / "CartPole-v1" / "1"
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "done.json").write_text("{}")
    (run_dir / "episodes.csv").write_text(f"global_step,return,length\n{episodes}")
    return run_dir


@pytest.mark.parametrize("episodes, stays", [("64,9.0,9\n", True), ("64,8.0,8\n", False)])
def test_the_evaluation_of_a_run_that_is_replaced_goes_unless_it_is_the_same_run(tmp_path, episodes, stays):
    config = {"script": "deep_spi_ppo.py", "args": {"run_name": "1"}}
    make_kept_run(tmp_path / "suite", config, episodes)
    evaluation = make_kept_run(tmp_path / "kept", config, "64,9.0,9\n") / "evaluation.csv"
    evaluation.write_text("policy,return,length,ended\nsampled,9.0,9,1\n")
    keep.keep(tmp_path / "suite", tmp_path / "kept")
    assert evaluation.exists() == stays


def test_keeping_refuses_nothing_to_keep_and_a_run_with_other_settings(tmp_path):
    for folder, gamma in (("suite", 0.9), ("kept", 0.8)):
        config = {"script": f"{folder}.py", "args": {"gamma": gamma, "run_name": "1"}}
        make_kept_run(tmp_path / folder, config, "")
    with pytest.raises(SystemExit, match="is a run with another gamma, script"):
        keep.keep(tmp_path / "suite", tmp_path / "kept")
    with pytest.raises(SystemExit, match="no finished run"):
        keep.keep(tmp_path, tmp_path / "elsewhere")
