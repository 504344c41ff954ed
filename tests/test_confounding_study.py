"""The study of confounding updates: which runs the study makes, keeps and skips, and what its summary says of them."""

import csv
import os
import re
from dataclasses import replace

import numpy as np
import pytest

import confounding_gridworld as cg
from benchmark.studies import confounding


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for the results in place of the committed one, not made yet."""
    monkeypatch.setattr(confounding, "FOLDER", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def made(folder, monkeypatch):
    """Runs cost nothing: what is tested is what is asked for, kept and skipped. Seed 13 fails."""
    made = []

    def train(args):
        if args.seed == 13:
            raise cg.RunFailed("stopped at step 32: not finite: losses/value_loss")
        made.append(args)
        iterations = args.total_timesteps // (args.num_envs * args.num_steps)
        V = np.outer(np.arange(iterations + 1.0), np.ones(2 * args.n_path + 6)) + args.seed
        V[2] -= {"ppo": 3.0, "additive": 2.5, "deep_spi": 1.5}[args.method]
        metrics = dict.fromkeys(confounding.NUMBERS, 0.25) | {"largest_drawdown": cg.largest_drawdown(V[:, 0])}
        return metrics, cg.History(V, None, None, None)

    monkeypatch.setattr(cg, "train", train)
    for module, name in ((cg, "draw_gridworld"), (confounding, "draw_values"), (confounding, "draw_falls")):
        monkeypatch.setattr(module, name, lambda *_: None)
    return made


def small_grid(monkeypatch, names, seeds):
    monkeypatch.setattr(confounding, "GRID", {name: confounding.GRID[name] for name in names})
    monkeypatch.setattr(confounding, "SEEDS", seeds)


# ==== The plan ====
def test_the_grid_is_the_study_of_the_issue():
    runs = [args for _, args in confounding.plan().values()]
    assert len(runs) == 11 * 30 + 2 * 20
    assert {(run.learning_rate, run.clip_coef) for run in runs} == {(2.5e-4, 0.1), (1e-3, 0.2), (2.5e-3, 0.4)}
    assert {run.latent_dim for run in runs} == {1, 2, 4, 8, 64}
    assert {(run.n_path, run.epsilon) for run in runs} == {(5, 0.2), (10, 0.1)}
    assert {run.start for run in runs} == {"fresh", "confounded"}
    deep_spi = {(run.reward_loss_coef, run.transition_loss_coef) for run in runs if run.method == "deep_spi"}
    assert {(0.01, 0.0005), (1.0, 1.0)} < deep_spi
    for run in runs:
        run.__post_init__()
        assert run.total_timesteps == 120_000


def test_methods_of_a_setting_differ_by_nothing_but_the_method():
    """Deep SPI and additive have the same coefficients; PPO, which has no use for them, is run once for all."""
    for setting in confounding.GRID:
        ppo, additive, deep_spi = (confounding.run_args(setting, method, 1) for method in cg.METHODS)
        assert replace(additive, method="deep_spi") == deep_spi
        coefficients = {name: getattr(deep_spi, name) for name in ("reward_loss_coef", "transition_loss_coef")}
        assert replace(ppo, method="deep_spi", **coefficients) == deep_spi
    assert confounding.run_args("centre", "ppo", 1) == confounding.run_args("DeepMDP's coefficients (1, 1)", "ppo", 1)
    assert confounding.run_args("centre", "ppo", 1) != confounding.run_args("D = 2", "ppo", 1)


def test_the_transition_loss_weighs_as_published_per_dimension():
    for setting in ("centre", "D = 2", "D = 4", "D = 8", "fresh start", "harder corridor (n 10, ε 0.1)"):
        args = confounding.run_args(setting, "deep_spi", 1)
        assert args.transition_loss_coef * args.latent_dim == pytest.approx(0.0005 * 3136)


def test_the_centre_is_the_scripts_default():
    assert confounding.run_args("centre", "deep_spi", 1) == cg.Args(method="deep_spi")


# ==== Runs ====
def test_the_study_is_kept_and_continued(made, folder, monkeypatch, capsys):
    small_grid(monkeypatch, ("centre", "D = 2"), range(1, 3))
    confounding.main(["--workers", "1"])
    assert len(made) == 2 * 2 * 3 == len(rows_of(folder / "runs.csv"))
    assert [run.seed for run in made] == [1] * 6 + [2] * 6  # seed by seed
    made.clear()
    monkeypatch.setattr(confounding, "SEEDS", range(1, 4))
    confounding.main(["--workers", "1"])
    assert [run.seed for run in made] == [3] * 6
    assert len(rows_of(folder / "runs.csv")) == len(rows_of(folder / "curves.csv")) == 18
    # a run that was interrupted between its curve and its line is made again, and counts once
    lines = (folder / "runs.csv").read_text().splitlines(keepends=True)
    (folder / "runs.csv").write_text("".join(lines[:-1]))
    made.clear()
    confounding.main(["--workers", "1"])
    assert len(made) == 1 and len(confounding.read_runs()) == 18
    capsys.readouterr()
    confounding.main(["--summary"])
    assert len(made) == 1
    text = (folder / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| 3 |") == 2 * 5
    assert "- Deep SPI − PPO: -1.50 [-1.50, -1.50], 3 seeds" in text  # 0.5 against 2.0, in every seed
    line = next(line for line in text.splitlines() if "| D = 2 | Deep SPI − additive" in line)
    assert "-1.00 [-1.00, -1.00]" in line


def test_a_run_with_other_settings_is_made_again_and_not_summed_up(made, folder, monkeypatch):
    small_grid(monkeypatch, ("centre",), range(1, 3))
    monkeypatch.setitem(confounding.CENTRE, "start_up", 0.001)
    confounding.main(["--workers", "1"])
    monkeypatch.undo()
    monkeypatch.setattr(confounding, "FOLDER", folder)
    assert confounding.by_setting(confounding.read_runs()) == {}


def test_settings_share_ppos_runs(made, folder, monkeypatch):
    small_grid(monkeypatch, ("centre", "DeepMDP's coefficients (1, 1)"), range(1, 3))
    confounding.main(["--workers", "1"])
    assert [run.method for run in made].count("ppo") == 2 and len(made) == 10
    groups = confounding.by_setting(confounding.read_runs())
    assert [list(runs) for runs in groups.values()] == [list(cg.METHODS)] * 2
    assert (folder / "summary.md").read_text().count("| PPO | 2 |") == 2


def test_differences_are_paired_by_seed():
    runs = {"deep_spi": {3: {"x": 1.0}, 1: {"x": 5.0}, 2: {"x": 0.0}}, "ppo": {1: {"x": 2.0}, 3: {"x": 7.0}}}
    assert confounding.differences(runs, "ppo", ["x"]).tolist() == [[3.0], [-6.0]]
    assert confounding.differences(runs, "additive", ["x"]).shape == (0, 1)
    assert confounding.differences(runs, "deep_spi", ["x"], "ppo").tolist() == [[-3.0], [6.0]]
    values = {"deep_spi": [(2.0, 5.0), (4.0, 7.0)], "ppo": [(1.0, 8.0), (3.0, 8.0)], "additive": [(0.0, 9.0)]}
    runs = {
        method: {seed: {confounding.PRIMARY: fall, "final_value": v} for seed, (fall, v) in enumerate(own)}
        for method, own in values.items()
    }
    row = confounding.drawdown_table({"centre": runs}).splitlines()[2]
    # half widths: 12.706 x 0 and 12.706 x 1
    assert row.endswith("| 2.00, less in 0 of 1 | 1.00 [1.00, 1.00], less in 0 of 2 | -1.00 | -2.00 [-14.71, 10.71] |")


def test_a_failed_run_is_said_and_not_averaged(made, folder, monkeypatch, capsys):
    small_grid(monkeypatch, ("centre",), range(12, 14))
    train = cg.train
    with pytest.raises(SystemExit) as stopped:
        confounding.main(["--workers", "1"])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert "seed 13" in captured.err and "losses/value_loss" in captured.err and "3 runs failed" in captured.err
    assert [run["seed"] for run in rows_of(folder / "runs.csv")] == ["12"] * 3
    assert "| centre | PPO | 1 |" in captured.out
    failed = (folder / "summary.md").read_text().splitlines()[-1].partition("Failed runs: ")[2].split("; ")
    assert len(failed) == 3 and failed[0] == "centre, PPO, seed 13: stopped at step 32: not finite: losses/value_loss"
    monkeypatch.setattr(cg, "train", lambda args: train(replace(args, seed=12)))  # the cause is gone
    confounding.main(["--workers", "1"])
    assert "Failed runs: none" in (folder / "summary.md").read_text()


def test_a_real_run_in_processes_of_its_own(folder, monkeypatch, capsys):
    """Two workers, three short runs: curves, numbers, provenance and pictures."""
    short = {"total_timesteps": 96, "num_envs": 4, "num_steps": 8, "update_epochs": 1}
    monkeypatch.setattr(confounding, "CENTRE", confounding.CENTRE | short)
    small_grid(monkeypatch, ("fresh start",), range(1, 2))
    confounding.main(["--workers", "2"])
    runs, curves = rows_of(folder / "runs.csv"), rows_of(folder / "curves.csv")
    assert {run["method"] for run in runs} == {curve["method"] for curve in curves} == set(cg.METHODS)
    by_key = {confounding.run_key(curve): curve for curve in curves}
    for run in runs:
        curve = by_key[confounding.run_key(run)]
        assert 0 <= float(run["outside_neighbourhood"]) <= 1 and float(run["seconds"]) > 0
        assert "torch=" in run["versions"] and re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", run["git_commit"])
        assert curve["steps"] == "0 32 64 96"
        V = np.array(curve["V_start"].split(), float)
        assert V[0] == pytest.approx(float(run["start_value"]), abs=1e-3) and len(V) == 4
        assert cg.total_decrease(V) == pytest.approx(float(run["total_decrease"]), abs=1e-3)
    pictures = ["falls.png", "gridworld.png", "values.png"]
    assert sorted(os.listdir(folder)) == sorted(["runs.csv", "curves.csv", "summary.md", *pictures])
    assert "3 of 3 runs" in capsys.readouterr().out


# ==== Bad input ====
def line_of(columns, **cells):
    """A header and a row of a run of the study, with some cells changed."""
    row = {name: 1 for name in columns} | vars(confounding.run_args("centre", "ppo", 1))
    row |= {"steps": "0 119808", "V_start": "4.8 8"} | cells
    return f"{','.join(columns)}\n{','.join(str(row[name]) for name in columns)}\n"


RUNS, CURVES = confounding.RUN_COLUMNS, confounding.CURVE_COLUMNS
BAD = {  # runs.csv, curves.csv, flags, what the one line must contain
    "nothing to sum up": (None, None, "--summary", ["runs.csv", "at least one run"]),
    "no workers": (None, None, "--workers 0", ["--workers", "0", "at least 1"]),
    "other columns": ("a,b\n1,2\n", None, "--summary", ["runs.csv", "columns"]),
    "half a line": (f"{','.join(RUNS)}\n1,2\n", None, "--summary", ["runs.csv", "row 2"]),
    "not a number": (line_of(RUNS, final_value="x"), line_of(CURVES), "--summary", ["numbers", "'x'"]),
    "not a number in a curve": (line_of(RUNS), line_of(CURVES, V_start="4.8 y"), "--summary", ["numbers", "'y'"]),
    "short curve": (line_of(RUNS), line_of(CURVES, steps="0 1024"), "--summary", ["curves.csv", "short"]),
    "no curve": (line_of(RUNS), None, "--workers 1", ["curves.csv", "lacks"]),
}


@pytest.mark.parametrize("key", BAD)
def test_bad_input_is_refused_in_one_line(key, folder, made, monkeypatch, capsys):
    runs, curves, flags, words = BAD[key]
    if runs:
        folder.mkdir()
        (folder / "runs.csv").write_text(runs)
    if curves:
        (folder / "curves.csv").write_text(curves)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as refused:
        confounding.main(flags.split())
    captured = capsys.readouterr()
    assert refused.value.code == 2 and not made
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1, captured
    for word in words:
        assert word in captured.err
    assert sorted(folder.rglob("*")) == before and folder.exists() == (runs is not None)  # no folder is made


def test_the_lines_that_are_made_bad_are_good_without_it(folder, made, capsys):
    folder.mkdir()
    (folder / "runs.csv").write_text(line_of(RUNS))
    (folder / "curves.csv").write_text(line_of(CURVES))
    confounding.main(["--summary"])
    assert "1 of 370 runs" in capsys.readouterr().out


def test_summary_takes_no_workers(folder, made, capsys):
    with pytest.raises(SystemExit) as refused:
        confounding.main(["--summary", "--workers", "2"])
    assert refused.value.code == 2 and not folder.exists()
    assert "--workers: not allowed with argument --summary" in capsys.readouterr().err
