"""The report: its numbers are those worked out by hand and rliable's, and all that is uneven is said."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rliable", reason="rliable is not installed: requirements-benchmark.txt has it")
import torch
from rliable import library, metrics
from scipy import stats

import deep_spi_ppo
from benchmark.report import aggregation, document, pictures, report, runs, uneven
from benchmark.studies import control
from benchmark.suites import RANDOM_PLAYER
from tests import synthetic

ROOT = Path(__file__).parent.parent
STEPS = 1280  # of a run; an episode ends every 10 steps unless said otherwise
CONFIG = {
    "script": "some_script.py",
    "args": {"num_envs": 2, "num_steps": 8, "total_timesteps": STEPS, "clip_coef": 0.1},
    "device": "cpu",
    "precision": "fp32",
    "torch_threads": 1,
    "git_commit": "1" * 40,
    "machine": "a processor, 2 cores",
    "versions": {"python": "3.11", "torch": "2.13"},
}
# Last scores of two algorithms, two games and seeds 1 and 2, chosen for what they are when normalised. Breakout: random
# 1.7, human 30.5, so 28.8 between them; Pong: -20.7 and 14.6, so 35.3.
LAST = {
    ("ppo", "Breakout"): (1.7, 30.5),  # 0 and 1
    ("ppo", "Pong"): (-3.05, 14.6),  # -20.7 + 35.3 / 2 = -3.05: 0.5; and 1
    ("ours", "Breakout"): (59.3, 30.5),  # 1.7 + 2 * 28.8 = 59.3: 2; and 1
    ("ours", "Pong"): (14.6, 14.6),  # 1 and 1
}


def write_run(suite, algorithm, task, seed, returns, *, steps=STEPS, done=True, env_id=None, args=(), **config):
    """One run's folder; `args` and `config` replace entries of CONFIG."""
    folder = suite / algorithm / task / str(seed)
    folder.mkdir(parents=True)
    own_args = CONFIG["args"] | {"env_id": env_id or f"{task}-v5", "seed": seed} | dict(args)
    (folder / "config.json").write_text(json.dumps(CONFIG | config | {"args": own_args}))
    lines = [f"{10 * (i + 1)},{value},10\n" for i, value in enumerate(returns)]
    (folder / "episodes.csv").write_text("global_step,return,length\n" + "".join(lines))
    if done:
        (folder / "done.json").write_text(json.dumps({"steps": steps, "minutes": 6.0, "sps": 100.0}))
    return folder


def write_suite(suite):
    """The complete and even suite of LAST: 20 episodes of another return, and then 100 of the score."""
    plan = []
    for (algorithm, task), scores in LAST.items():
        for seed, score in enumerate(scores, start=1):
            write_run(suite, algorithm, task, seed, [score - 1] * 20 + [score] * 100)
            plan.append({"algorithm": algorithm, "label": task, "seed": seed, "total_timesteps": STEPS})
    (suite / "plan.json").write_text(json.dumps(plan))
    return suite


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def remarks_of(suite):
    """The bullets of the report's first section."""
    results = runs.read_results(suite)
    tasks = {"Aggregates": results.scored_tasks, "Improvement": results.tasks}
    rectangles = [aggregation.choose_rectangle(results, own, name) for name, own in tasks.items()]
    return report.unevenness(results, rectangles)[1].items


@pytest.fixture
def suite(tmp_path):
    return write_suite(tmp_path / "suite")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The whole report on the even suite."""
    folder = write_suite(tmp_path_factory.mktemp("report") / "suite")
    report.write_report(folder, folder / "report", resamples=200)
    return folder / "report"


# Scores of one run


def test_last_and_best_of_a_run(tmp_path):
    rising, falling = range(120), range(119, -1, -1)  # 120 episodes
    # last 100 rising: 20 ... 119, mean 69.5; falling: 99 ... 0, mean 49.5; the best 100 in a row: 20 ... 119 both times
    for seed, returns, last in ((1, rising, 69.5), (2, falling, 49.5)):
        write_run(tmp_path, "ppo", "Pong", seed, returns)
        run = runs.read_results(tmp_path).runs[seed - 1]
        assert (run.episodes, run.last, run.best_window, run.best_episode) == (120, last, 69.5, 119)


def test_with_fewer_episodes_the_best_window_is_all_of_them(tmp_path):
    write_run(tmp_path, "ppo", "Pong", 1, [9, 0, 3])
    (run,) = runs.read_results(tmp_path).runs
    assert (run.last, run.best_window, run.best_episode) == (4, 4, 9)  # not 9, a window of one


def test_a_curve_is_the_mean_of_the_last_100_that_had_ended():
    steps, returns = np.arange(1, 201), np.arange(1.0, 201.0)
    curve = runs.curve_of(steps + 5, returns, np.array([5, 6, 15, 205]))
    # nothing by step 5; episode 1 by step 6; 1 ... 10 by step 15, mean 5.5; 101 ... 200 by step 205, mean 150.5
    assert np.isnan(curve[0])
    assert curve[1:].tolist() == [1, 5.5, 150.5]


# Numbers over runs


def test_aggregates_worked_out_by_hand(written):
    points = {(row["algorithm"], row["metric"]): float(row["point"]) for row in read_csv(written / "aggregates.csv")}
    expected = {
        # ppo's four scores 0, 0.5, 1, 1: without the lowest and the highest (0.5 + 1) / 2
        ("ppo", "IQM"): 0.75,
        ("ppo", "median"): 0.625,  # of the games' means 0.5 and 0.75
        ("ppo", "mean"): 0.625,
        ("ppo", "optimality gap"): 0.375,  # (1 + 0.5 + 0 + 0) / 4
        # ours 1, 1, 1, 2
        ("ours", "IQM"): 1.0,
        ("ours", "median"): 1.25,  # of 1.5 and 1
        ("ours", "mean"): 1.25,
        ("ours", "optimality gap"): 0.0,  # what is above 1 closes no gap
    }
    assert points == pytest.approx(expected, abs=1e-6)


def test_improvement_worked_out_by_hand(written):
    (row,) = read_csv(written / "probability_of_improvement.csv")
    # Breakout, 2 and 1 against 0 and 1: three wins, one tie, 3.5 / 4; Pong, 1, 1 against 0.5, 1: two of each, 3 / 4
    assert (row["algorithm"], row["baseline"]) == ("ours", "ppo")
    assert float(row["point"]) == pytest.approx((0.875 + 0.75) / 2)


def test_task_table_worked_out_by_hand(written):
    rows = {(row["algorithm"], row["task"]): row for row in read_csv(written / "tasks.csv")}
    row = rows["ppo", "Breakout"]
    assert float(row["last_100"]) == pytest.approx(16.1)  # of 1.7 and 30.5
    # two seeds: the standard error is half their distance, 14.4, and t with one degree of freedom is 12.706
    assert [float(row["low"]), float(row["high"])] == pytest.approx(
        [16.1 - 12.706 * 14.4, 16.1 + 12.706 * 14.4], abs=0.01
    )
    assert float(row["human_normalised"]) == pytest.approx(0.5)
    assert float(row["published_ppo"]) == pytest.approx(4.770833, abs=1e-6)
    text = (written / "report.md").read_text()
    assert "| Pong | ppo | 2 | 1,280 | 5.775 [-106.4, 117.9] | 5.775 | 5.775 | 0.750 | 0.0 (no score) |" in text


def test_profile_and_curve_worked_out_by_hand(written):
    profile = [row for row in read_csv(written / "performance_profiles.csv") if row["algorithm"] == "ppo"]
    above = {float(row["threshold"]): float(row["point"]) for row in profile}
    assert above[0.0] == 0.75  # of 0, 0.5, 1, 1: a score must be above the threshold, not at it
    assert all(
        share == (0.75 if threshold < 0.5 else 0.5 if threshold < 1 else 0) for threshold, share in above.items()
    )
    curve = [row for row in read_csv(written / "sample_efficiency.csv") if row["algorithm"] == "ppo"]
    assert float(curve[-1]["point"]) == pytest.approx(0.75)  # the IQM at the end
    # by step 25.6 each run has two episodes, of one below its score: -1/28.8, 1 - 1/28.8, 0.5 - 1/35.3, 1 - 1/35.3
    assert float(curve[0]["step"]) == 25.6
    assert float(curve[0]["point"]) == pytest.approx((0.5 - 1 / 35.3 + 1 - 1 / 28.8) / 2, abs=1e-6)


def test_statistics_are_rliables():
    random = np.random.default_rng(3)
    x, y = random.normal(size=(5, 7)).round(1), random.normal(size=(4, 7)).round(1)  # rounded: some are equal
    curves = random.normal(size=(5, 7, 3))
    thresholds = np.linspace(-1, 1, 9)
    assert aggregation.interquartile_mean(x) == pytest.approx(metrics.aggregate_iqm(x), abs=1e-12)
    by_point = [metrics.aggregate_iqm(curves[..., i]) for i in range(3)]
    assert aggregation.interquartile_mean(curves) == pytest.approx(by_point, abs=1e-12)
    theirs = metrics.aggregate_iqm, metrics.aggregate_median, metrics.aggregate_mean, metrics.aggregate_optimality_gap
    assert aggregation.four_aggregates(x) == pytest.approx([function(x) for function in theirs], abs=1e-12)
    assert aggregation.improvement(x, y)[0] == pytest.approx(metrics.probability_of_improvement(x, y), abs=1e-12)
    assert aggregation.share_above(x, thresholds) == pytest.approx(
        library.score_distributions(x, thresholds), abs=1e-12
    )


def test_intervals_are_rliables():
    def theirs(scores):
        return np.array([metrics.aggregate_iqm(scores), metrics.aggregate_mean(scores)])

    random = np.random.default_rng(4)
    x, y = random.normal(size=(5, 7)), random.normal(size=(4, 7))
    ours = aggregation.estimate({"x": x, "y": y}, aggregation.four_aggregates, resamples=100)
    for name, scores in (("x", x), ("y", y)):  # each from the same seed: an algorithm's bounds depend on no other's
        np.random.seed(0)
        _, intervals = library.get_interval_estimates({name: scores}, theirs, reps=100)
        for i, interval in zip((0, 2), intervals[name].T, strict=True):  # IQM, mean
            assert aggregation.bounds(ours[name], i)[1:] == pytest.approx(interval, abs=1e-12)


def test_interval_over_seeds_is_students():
    """3.182: the table of t, 97.5 %, three degrees of freedom. The standard deviation of 1, 2, 4, 9 is sqrt(38 / 3)."""
    ours = aggregation.mean_over_seeds(np.array([1.0, 2.0, 4.0, 9.0])[:, None])
    half = 3.182 * (38 / 3) ** 0.5 / 2
    assert aggregation.bounds(ours, 0) == pytest.approx((4, 4 - half, 4 + half), abs=2e-3)


def test_interval_of_a_share_is_wilsons():
    for successes, trials in ((0, 2), (2, 2), (3, 7), (50, 60)):
        theirs = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert aggregation.wilson_interval(successes / trials, trials) == pytest.approx(tuple(theirs), abs=1e-12)


def test_two_seeds_that_both_win_leave_most_of_the_interval():
    wins = np.array([[2.0], [3.0]]), np.array([[0.0], [1.0]])
    assert aggregation.bounds(aggregation.improvement_estimate(*wins), 0) == pytest.approx((1, 0.342, 1), abs=1e-3)
    many = [np.repeat(side, 5, axis=1) for side in wins]  # on each of five tasks: ten trials
    assert aggregation.bounds(aggregation.improvement_estimate(*many), 0) == pytest.approx((1, 0.722, 1), abs=1e-3)
    assert np.isnan(aggregation.improvement_estimate(wins[0][:1], wins[1]).low).all()


# How X and Y are drawn: alike; X better; of very unlike spread; X mostly good and at times lost; with many ties at 500.
RETURNS = {
    "alike": (lambda rng, n: rng.normal(0, 1, n), lambda rng, n: rng.normal(0, 1, n)),
    "better": (lambda rng, n: rng.normal(2, 1, n), lambda rng, n: rng.normal(0, 1, n)),
    "wide": (lambda rng, n: rng.normal(1, 10, n), lambda rng, n: rng.normal(0, 1, n)),
    "narrow": (lambda rng, n: rng.normal(1, 0.1, n), lambda rng, n: rng.normal(0, 1, n)),
    "lost": (lambda rng, n: 5.0 * (rng.random(n) < 0.8) + rng.normal(0, 1, n), lambda rng, n: rng.normal(3, 0.5, n)),
    "ties": (lambda rng, n: rng.normal(505, 10, n).clip(max=500), lambda rng, n: rng.normal(500, 10, n).clip(max=500)),
}


@pytest.mark.parametrize("seeds, tasks", [(2, 1), (3, 1), (5, 1), (10, 1), (2, 5), (5, 5)])
def test_interval_of_the_improvement_covers_it(seeds, tasks):
    """In 95 % of 1,000 suites, up to the grain of few seeds: two against two have five outcomes, or nine with ties."""
    for draw_x, draw_y in RETURNS.values():
        rng = np.random.default_rng(0)
        x, y = draw_x(rng, 10**6), draw_y(rng, 10**6)
        truth = (x > y).mean() + 0.5 * (x == y).mean()
        covered = []
        for _ in range(1000):
            sides = (draw(rng, seeds * tasks).reshape(seeds, tasks) for draw in (draw_x, draw_y))
            _, low, high = aggregation.bounds(aggregation.improvement_estimate(*sides), 0)
            covered.append(low <= truth <= high)
        assert np.mean(covered) > (0.9 if seeds * tasks < 10 else 0.93)


# Scales


def test_scores_of_control_tasks_are_normalised_worked_out_by_hand(tmp_path):
    """A random player's 22.6 is 0 and 475 is 1; the tasks differ in length, so that the curve is over shares."""
    for seed, score in ((1, 22.6), (2, 475.0), (3, 475.0)):
        write_run(tmp_path, "ppo", "CartPole-v1", seed, [score] * 100, env_id="CartPole-v1")
        args = {"env_id": "Acrobot-v1", "steps": 2 * STEPS, "args": {"total_timesteps": 2 * STEPS}}
        write_run(tmp_path, "ppo", "Acrobot-v1-sticky", seed, [-100] * 256, **args)  # where it is solved: 1
    report.write_report(tmp_path, tmp_path / "report", resamples=50)
    points = {row["metric"]: float(row["point"]) for row in read_csv(tmp_path / "report" / "aggregates.csv")}
    # 0 and five times 1
    expected = {"IQM": 1.0, "median": (1 + 2 / 3) / 2, "mean": 5 / 6, "optimality gap": 1 / 6}
    assert points == pytest.approx(expected, abs=1e-6)
    rows = {row["task"]: row for row in read_csv(tmp_path / "report" / "tasks.csv")}
    assert float(rows["CartPole-v1"]["normalised"]) == pytest.approx(2 / 3)
    assert "published_ppo" not in rows["CartPole-v1"]
    curve = read_csv(tmp_path / "report" / "sample_efficiency.csv")
    assert (curve[0]["share"], curve[-1]["share"], float(curve[-1]["point"])) == ("0.02", "1", 1.0)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "human-normalised" not in text.lower() and "Published PPO" not in text
    assert "| CartPole-v1 | ppo | 3 | 1,280 | 324.2 [" in text and "| 0.667 |" in text


@pytest.mark.parametrize("env_id", RANDOM_PLAYER)
def test_a_random_player_gets_what_the_scale_says(env_id):
    args = deep_spi_ppo.Args(env_id=env_id, num_envs=200, seed=77)
    games, rng, first = deep_spi_ppo.Games(args), np.random.default_rng(0), {}
    games.reset()
    while len(first) < args.num_envs:
        _, _, _, _, episodes = games.step(torch.from_numpy(rng.integers(games.num_actions, size=args.num_envs)))
        first = {i: episode[0] for i, episode in episodes.items()} | first
    returns = np.array(list(first.values()))
    assert abs(returns.mean() - RANDOM_PLAYER[env_id]) < 4 * returns.std(ddof=1) / len(returns) ** 0.5 + 0.5


# What a score is of


def evaluate_runs(suite, value):
    """Two games of each final policy, of mean return `value`; and a greedy one, which counts nowhere."""
    for run_dir in suite.glob("*/*/*/"):
        if (run_dir / "done.json").exists():
            games = f"greedy,999,1,1\nsampled,{value - 1},1,1\nsampled,{value + 1},1,1\n"
            (run_dir / "evaluation.csv").write_text("policy,return,length,ended\n" + games)


def test_scores_are_of_the_final_policies_if_all_were_evaluated(suite):
    evaluate_runs(suite, 16.1)  # of Breakout: half of what a human has
    report.write_report(suite, suite / "report", resamples=50)
    rows = {(row["algorithm"], row["task"]): row for row in read_csv(suite / "report" / "tasks.csv")}
    row = rows["ppo", "Breakout"]
    assert float(row["score"]) == pytest.approx(16.1) and float(row["human_normalised"]) == pytest.approx(0.5)
    assert float(row["last_100"]) == pytest.approx(16.1)  # of 1.7 and 30.5
    assert float(rows["ours", "Breakout"]["last_100"]) == pytest.approx(44.9)
    points = {(row["algorithm"], row["metric"]): row["point"] for row in read_csv(suite / "report" / "aggregates.csv")}
    assert points["ppo", "mean"] == points["ours", "mean"]
    (row,) = read_csv(suite / "report" / "probability_of_improvement.csv")
    assert float(row["point"]) == 0.5
    text = (suite / "report" / "report.md").read_text()
    assert "final policy [95 %]" in text and "score is the mean return of its final policy" in text


def test_where_one_final_policy_was_not_evaluated_none_counts(suite):
    evaluate_runs(suite, 16.1)
    (suite / "ours" / "Pong" / "1" / "evaluation.csv").unlink()
    remarks = remarks_of(suite)
    assert remarks == ["Scores are of training, as not every final policy was evaluated: not ours (seed 1 of Pong)."]
    results = runs.read_results(suite)
    assert all(results.score(run) == run.last for run in results.runs)


def test_a_damaged_evaluation_is_said(suite):
    (suite / "ppo/Pong/1/evaluation.csv").write_text("policy,return,length,ended\nsampled,nan,1,1\n")
    assert any("ppo/Pong/1: in evaluation.csv a return is not a finite number" in line for line in remarks_of(suite))


def play_on_the_way(suite, steps, value):
    """Two games of each run's policies of these steps, of mean return `value(step)`."""
    for run_dir in suite.glob("*/*/*/"):
        if (run_dir / "done.json").exists():
            games = [f"{step},sampled,{value(step) + change},1,1" for step in steps for change in (-1, 1)]
            (run_dir / "policies.csv").write_text("\n".join(["global_step,policy,return,length,ended", *games]) + "\n")


def test_curves_are_of_policies_if_all_of_them_played(suite):
    """Worked out by hand, and drawn whatever the numbers of environments."""
    for task in ("Breakout", "Pong"):
        for seed in "12":
            rewrite(suite / "ours" / task / seed, args={"num_envs": 128})
    evaluate_runs(suite, 16.1)
    play_on_the_way(suite, (120, 640), lambda step: step / 100)
    report.write_report(suite, suite / "report", resamples=50)
    rows = read_csv(suite / "report" / "learning_curves.csv")
    curve = {float(row["step"]): row["point"] for row in rows if (row["task"], row["algorithm"]) == ("Pong", "ours")}
    # ten points up to 1,280; straight from 1.2 at 120 to 6.4 at 640 and on to 16.1 at the end
    assert len(curve) == 10 and float(curve[128]) == pytest.approx(1.28) and float(curve[640]) == pytest.approx(6.4)
    assert float(curve[896]) == pytest.approx(6.4 + 0.4 * (16.1 - 6.4)) and float(curve[1280]) == pytest.approx(16.1)
    efficiency = read_csv(suite / "report" / "sample_efficiency.csv")
    scaled = [(640 / 100 - random) / (human - random) for random, human in ((1.7, 30.5), (-20.7, 14.6))]
    (point,) = [row["point"] for row in efficiency if (row["algorithm"], row["step"]) == ("ours", "640")]
    assert float(point) == pytest.approx(np.mean(scaled), abs=1e-6)  # two runs of each: the quarters cut one of each
    text = (suite / "report" / "report.md").read_text()
    assert "Not drawn" not in text and "Mean return of the policies that were kept on the way" in text
    assert (suite / "report" / "learning_curves.png").exists()


def test_where_policies_on_the_way_did_not_play_it_is_said(suite):
    evaluate_runs(suite, 16.1)
    play_on_the_way(suite, (320, 640), lambda step: 1)
    assert remarks_of(suite)[0].startswith("Nothing: ")
    path = suite / "ours" / "Pong" / "1" / "policies.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    fewer = "Fewer policies on the way than other seeds, so that curves are straight there: ours (seed 1 of Pong)."
    assert remarks_of(suite) == [fewer]
    path.unlink()
    results = runs.read_results(suite)
    assert not results.by_policies and results.by_final_policy
    none = "Curves are of training, as not every run has policies on the way: not ours (seed 1 of Pong)."
    assert remarks_of(suite) == [none]
    path.write_text("global_step,policy,return,length,ended\n320,sampled,inf,1,1\n")
    assert any("ours/Pong/1: in policies.csv a return is not a finite number" in line for line in remarks_of(suite))


def test_training_time_worked_out_by_hand(tmp_path):
    """Three seeds of 6, 12 and 60 minutes: at half the steps half the median has passed, 0.1 hours."""
    for seed, minutes in ((1, 6), (2, 12), (3, 60)):
        run_dir = write_run(tmp_path, "ppo", "Pong", seed, range(128))
        (run_dir / "done.json").write_text(json.dumps({"steps": STEPS, "minutes": minutes, "sps": 1.0}))
    report.write_report(tmp_path, tmp_path / "report", resamples=50)
    over_steps, over_time = (read_csv(tmp_path / "report" / f"learning_curves{name}.csv") for name in ("", "_time"))
    assert [row["point"] for row in over_steps] == [row["point"] for row in over_time]
    minutes = [float(row["minutes"]) for row in over_time]
    assert minutes == pytest.approx([12 * float(row["step"]) / STEPS for row in over_steps])
    assert minutes[-1] == pytest.approx(12)


def test_curves_of_other_numbers_of_environments_are_not_drawn(suite):
    for task in ("Breakout", "Pong"):
        for seed in "12":
            rewrite(suite / "ours" / task / seed, args={"num_envs": 128})
    report.write_report(suite, suite / "report", resamples=50)
    text = (suite / "report" / "report.md").read_text()
    assert text.count("Not drawn: among more environments") == 3  # the aggregate's curve, and a game's, twice
    assert "They have: ppo: 2, ours: 128." in text
    assert not (suite / "report" / "sample_efficiency.png").exists()
    assert not (suite / "report" / "learning_curves.png").exists()


def test_curves_of_those_that_have_as_many_environments_are_drawn(suite):
    for task in ("Breakout", "Pong"):
        for seed in (1, 2):
            write_run(suite, "wide", task, seed, [seed] * 100, args={"num_envs": 128})
    report.write_report(suite, suite / "report", resamples=50)
    text = (suite / "report" / "report.md").read_text()
    assert "Pong, wide. Not drawn: among more environments" in text
    assert (suite / "report" / "learning_curves.png").exists()


def test_differences_are_welchs(suite):
    report.write_report(suite, suite / "report", resamples=50)
    breakout, pong = read_csv(suite / "report" / "differences.csv")
    # Breakout: ours 59.3, 30.5, PPO 1.7, 30.5: 28.8 more, each side's standard error 14.4, two degrees of freedom
    assert (breakout["algorithm"], breakout["baseline"], breakout["seeds"]) == ("ours", "ppo", "2, 2")
    assert float(breakout["difference"]) == pytest.approx(28.8)
    assert float(breakout["high"]) == pytest.approx(28.8 + 4.302653 * 14.4 * 2**0.5, rel=1e-4)
    assert pong["task"] == "Pong" and (suite / "report" / "differences.tex").exists()


def test_a_method_looks_the_same_in_every_figure_of_a_report(suite, monkeypatch):
    """Those that the project does not know too, and where the baseline is not among them."""
    for algorithm in ("new", "other"):
        for task in ("Breakout", "Pong"):
            for seed in (1, 2):
                write_run(suite, algorithm, task, seed, [seed] * 100)
    looks = []
    for name in ("draw_bars", "draw_curves"):
        draw = getattr(report, name)
        monkeypatch.setattr(
            report, name, lambda *args, draw=draw, **more: (looks.append(args[1]), draw(*args, **more))[1]
        )
    report.write_report(suite, suite / "report", baseline="new", resamples=50)
    assert len(looks) == 6 and all(look == looks[0] for look in looks)
    assert looks[0].keys() == {"ppo", "ours", "new", "other"} and len(set(looks[0].values())) == 4
    assert pictures.NAMES.keys() == pictures.COLOURS.keys() and pictures.LINES.keys() <= pictures.NAMES.keys()


def test_a_method_has_one_colour():
    import confounding_gridworld

    assert confounding_gridworld.COLOURS.items() <= pictures.COLOURS.items()
    assert confounding_gridworld.NAMES.items() <= pictures.NAMES.items()
    assert {algorithm: name for name, algorithm in control.PLACEMENTS.items()}.items() <= pictures.NAMES.items()
    found = pictures.colours(["mine", "deep_spi", "yours", "ppo"])
    assert found["ppo"] == pictures.COLOURS["ppo"] and len(set(found.values())) == 4
    assert not set(pictures.OTHER_COLOURS) & set(pictures.COLOURS.values())


def test_no_zero_is_negative(tmp_path):
    assert aggregation.number(-0.0001) == "0.000" and aggregation.number(-0.4) == "-0.400"
    document.write_csv(tmp_path / "table.csv", [{"a": -0.0, "b": 1}, {"a": -1.5, "b": 2}])
    assert (tmp_path / "table.csv").read_text() == "a,b\n0,1\n-1.5,2\n"


def test_a_game_is_known_under_an_id_with_a_slash(tmp_path):
    write_run(tmp_path, "ppo", "ALE-Pong-v5", 1, [1] * 100, env_id="ALE/Pong-v5")
    assert runs.read_results(tmp_path).scored_tasks == ["ALE-Pong-v5"]


def test_report_and_differences_are_written_in_any_locale(suite):
    """Their texts have Greek letters and signs that no locale of nothing but ASCII knows."""
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    early = ROOT / "benchmark" / "results" / "suites" / "early"
    printed = {}
    for module, folder in (("report", suite), ("differences", early)):
        command = [sys.executable, "-m", f"benchmark.{module}", str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | ascii_only, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        printed[module] = done.stdout.decode("utf-8")
    assert "Deep SPI − PPO" in printed["differences"]
    for name in ("report.md", "report.html"):
        assert "√((n-1)/n)" in (suite / "report" / name).read_text(encoding="utf-8")


# Tables for print


def test_a_table_for_latex():
    rows = [["CartPole_v1", "deep_spi", "-1.5 [-2, 3]", "1,000"], ["[x]", "mine & α", "", "7"], ["[x]", "ppo", "1", ""]]
    assert document.table_as_latex(
        document.Table(["task", "algorithm", "score [95 %]", "steps"], rows)
    ).splitlines() == [
        r"% needs \usepackage{booktabs,adjustbox}",
        r"\noindent\begin{adjustbox}{max width=\linewidth}",
        r"\begin{tabular}{llrr}",
        r"\toprule",
        r"task & algorithm & score [95 \%] & steps \\",
        r"\midrule",
        r"CartPole\_v1 & Deep SPI & $-$1.5 [$-$2, 3] & 1,000 \\",
        r"\addlinespace {}[x] & mine \& $\alpha$ &  & 7 \\",  # each task is named once, and set apart
        r" & PPO & 1 &  \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{adjustbox}%",
    ]


def test_every_sign_has_a_form_for_latex():
    assert document.text_as_latex(r"a\b^c~d") == r"a\textbackslash{}b\textasciicircum{}c\textasciitilde{}d"
    assert document.text_as_latex("#$%&_{}<|>") == r"\#\$\%\&\_\{\}\textless{}\textbar{}\textgreater{}"
    assert document.text_as_latex("é λ Ω 中 √") == r"é $\lambda$ $\Omega$ [U+4E2D] [U+221A]"
    assert document.text_as_latex("x--y 2026-11-25 a-1 e-5") == "x-{}-y 2026-11-25 a-1 e-5"  # nothing negative here
    assert [document.text_as_latex(text) for text in ("[a]", "*")] == ["{}[a]", "{}*"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_sets_the_tables(written, tmp_path):
    """The report's own, and one of every sign there might be in a name."""
    signs = "".join(chr(i) for i in range(32, 0x250)) + document.GREEK + "−√中"
    (tmp_path / "signs.tex").write_text(document.table_as_latex(document.Table(["sign"], [[sign] for sign in signs])))
    names = [*sorted(written.glob("*.tex")), tmp_path / "signs.tex"]
    assert len(names) == 6
    wide = document.Table([f"column {i}" for i in range(20)], [[f"{i}.5 [1, 2]" for i in range(20)]] * 120)
    (tmp_path / "wide.tex").write_text(document.table_as_latex(wide))
    names.append(tmp_path / "wide.tex")
    text = "".join(f"\\input{{{path}}}\n\n" for path in names)
    preamble = "\\documentclass{article}\\usepackage{booktabs,adjustbox}\\pagestyle{empty}\\begin{document}\n"
    (tmp_path / "all.tex").write_text(preamble + text + "\\end{document}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "all.pdf").exists(), done.stdout[-2000:]
    log = (tmp_path / "all.log").read_bytes()
    assert b"Missing character" not in log and b"Overfull \\hbox" not in log


# Files


def test_html_is_self_contained(written):
    page = (written / "report.html").read_text()
    sources, tags = [], set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.add(tag)
            sources.extend(value for name, value in attributes if name in ("src", "href", "srcset", "data"))

    Reader().feed(page)
    pictures = sorted(written.glob("*.png"))
    assert len(sources) == len(pictures) == len(list(written.glob("*.pdf"))) == 6
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import", page)


def test_html_and_markdown_say_the_same(written):
    class Reader(HTMLParser):
        cells = ()

        def handle_data(self, data):
            self.cells += (data,) if self.lasttag in ("td", "th", "li") and data.strip() else ()

    reader = Reader()
    reader.feed((written / "report.html").read_text())
    text = (written / "report.md").read_text()
    assert len(reader.cells) > 90
    assert all(cell in text for cell in reader.cells)


def test_text_is_escaped():
    assert document.block_as_html(document.Text("a <b> & `c`")) == "<p>a &lt;b&gt; &amp; <code>c</code></p>"
    assert document.block_as_markdown(document.Table(["h"], [["a|b"]])).splitlines()[-1] == "| a\\|b |"


def test_report_comes_out_the_same_again(written, tmp_path):
    report.write_report(written.parent, tmp_path / "again", resamples=200)
    names = sorted(path.name for path in written.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((written / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_report_names_precision_processor_and_versions(written):
    text = (written / "report.md").read_text()
    assert all(word in text for word in ("fp32", "a processor, 2 cores", "torch 2.13", "1" * 40, "200 resamples"))
    row = read_csv(written / "runs.csv")[0]
    assert (row["precision"], row["machine"], row["versions"]) == ("fp32", CONFIG["machine"], "python=3.11 torch=2.13")


# What is missing or uneven


def test_an_even_suite_has_nothing_to_remark(suite):
    (remark,) = remarks_of(suite)
    assert remark.startswith("Nothing: ")


def test_a_run_without_done_is_said_and_not_averaged(suite):
    (suite / "ppo" / "Pong" / "2" / "done.json").unlink()
    remarks = remarks_of(suite)
    assert "Left out, as unfinished (no done.json): ppo (seed 2 of Pong)." in remarks
    assert "Missing: 1 of 8 expected runs: ppo (seed 2 of Pong)." in remarks
    report.write_report(suite, suite / "report", resamples=50)
    rows = {(row["algorithm"], row["task"]): row for row in read_csv(suite / "report" / "tasks.csv")}
    assert float(rows["ppo", "Pong"]["last_100"]) == -3.05  # seed 1 alone
    # the aggregates keep seed 1 of ppo: 0 and 0.5
    points = {(row["algorithm"], row["metric"]): row for row in read_csv(suite / "report" / "aggregates.csv")}
    assert float(points["ppo", "mean"]["point"]) == 0.25
    assert "Aggregates: left out, as not every task has that seed: ppo (seed 2 of Breakout)." in remarks


def test_one_seed_has_no_interval(suite):
    for task in ("Breakout", "Pong"):
        (suite / "ours" / task / "2" / "done.json").unlink()
    assert any(
        remark.startswith("Only one seed, so no interval") and remark.endswith(": ours (seed 1 of every task).")
        for remark in remarks_of(suite)
    )
    report.write_report(suite, suite / "report", resamples=50)
    for name in ("aggregates", "tasks", "performance_profiles", "sample_efficiency", "probability_of_improvement"):
        for row in read_csv(suite / "report" / f"{name}.csv"):
            assert (row["low"] == "") == (row["high"] == "") == (row["algorithm"] == "ours"), (name, row)
    assert "| ours | 1 | 2 | 1.500 | 1.500 | 1.500 | 0.000 |" in (suite / "report" / "report.md").read_text()


def rewrite(folder, **config):
    """Replace entries of a run's config; `args` are merged."""
    path = folder / "config.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps(old | config | {"args": old["args"] | config.get("args", {})}))


def plan_one_more(suite):
    plan = json.loads((suite / "plan.json").read_text())
    plan.append({"algorithm": "ours", "label": "Pong", "seed": 3, "total_timesteps": STEPS})
    (suite / "plan.json").write_text(json.dumps(plan))


def mean_it(suite, flags):
    """Plan these settings for PPO on Pong."""
    plan = json.loads((suite / "plan.json").read_text())
    plan = [run | {"flags": flags} if (run["algorithm"], run["label"]) == ("ppo", "Pong") else run for run in plan]
    (suite / "plan.json").write_text(json.dumps(plan))


UNEVEN = {
    "planned but absent": (plan_one_more, "Missing: 1 of 9 expected runs: ours (seed 3 of Pong)."),
    "not planned": (
        lambda suite: write_run(suite, "ppo", "Pong", 3, [1] * 100),
        "Not in the plan, and averaged with the rest: ppo (seed 3 of Pong).",
    ),
    "no plan": (lambda suite: (suite / "plan.json").unlink(), "There is no plan.json: expected is every algorithm"),
    "moved aside": (
        lambda suite: (suite / "ppo" / "Pong" / "1.broken-17").mkdir(),
        "Folders moved aside as broken, and left out: 1.",
    ),
    "longer": (
        lambda suite: (suite / "ppo/Pong/2/done.json").write_text('{"steps": 2560, "minutes": 1, "sps": 1}'),
        "Unequal lengths of Pong, each scored at its own end, curves cut at the shortest: "
        "1,280 steps: ours (seeds 1, 2 of Pong), ppo (seed 1 of Pong); 2,560 steps: ppo (seed 2 of Pong).",
    ),
    "shorter than planned": (
        lambda suite: (suite / "ppo/Pong/2/done.json").write_text('{"steps": 1264, "minutes": 1, "sps": 1}'),
        "Not of the length meant, and averaged with the rest: 1,264 steps, not 1,280: ppo (seed 2 of Pong).",
    ),
    "few episodes": (
        lambda suite: (suite / "ppo/Pong/2/episodes.csv").write_text("global_step,return,length\n7,1,7\n"),
        "Fewer than 100 episodes (at least 1), so that best and last ones are of fewer: ppo (seed 2 of Pong).",
    ),
    "no episode": (
        lambda suite: (suite / "ppo/Pong/2/episodes.csv").write_text("global_step,return,length\n"),
        "No episode ended in training, so there is no score: ppo (seed 2 of Pong).",
    ),
    "precision": (
        lambda suite: rewrite(suite / "ppo/Pong/2", precision="bf16"),
        "Mixed precision: `fp32`: ours (seeds 1, 2 of every task), ppo (seeds 1, 2 of Breakout; seed 1 of Pong); "
        "`bf16`: ppo (seed 2 of Pong).",
    ),
    "version": (
        lambda suite: rewrite(suite / "ppo/Pong/2", versions={"python": "3.11", "torch": "2.14"}),
        "Mixed version of torch: `2.13`: ",
    ),
    "commit": (lambda suite: rewrite(suite / "ppo/Pong/2", git_commit="2" * 40), "Mixed git_commit: `1111"),
    "changed code": (
        lambda suite: rewrite(suite / "ppo/Pong/2", git_commit="1" * 40 + "-dirty"),
        "Code not exactly known, files that differ from the commit (`-dirty`): ppo (seed 2 of Pong).",
    ),
    "code in no commit": (
        lambda suite: rewrite(suite / "ppo/Pong/2", git_commit="1" * 40 + "-untracked"),
        "Code not exactly known, a script that is in no commit (`-untracked`): ppo (seed 2 of Pong).",
    ),
    "something else for a commit": (
        lambda suite: rewrite(suite / "ppo/Pong/2", git_commit="1" * 39),
        f"Code not exactly known, `{'1' * 39}` is no commit: ppo (seed 2 of Pong).",
    ),
    "no commit": (
        lambda suite: rewrite(suite / "ppo/Pong/2", git_commit=None),
        "Code not exactly known, no commit recorded: ppo (seed 2 of Pong).",
    ),
    "not as planned": (
        lambda suite: mean_it(suite, {"sticky": "0.25"}),
        "Not as planned, sticky is `(absent)`, not `0.25`: ppo (seeds 1, 2 of Pong).",
    ),
    "machine": (
        lambda suite: rewrite(suite / "ppo/Pong/2", machine="another"),
        "Mixed machine: `a processor, 2 cores`",
    ),
    "setting": (
        lambda suite: rewrite(suite / "ppo/Pong/2", args={"clip_coef": 0.2}),
        "ppo: Mixed clip_coef: `0.1`: ppo (seeds 1, 2 of Breakout; seed 1 of Pong); `0.2`: ppo (seed 2 of Pong).",
    ),
    "setting of a task": (
        lambda suite: [rewrite(suite / "ppo/Pong" / seed, args={"sticky": 0.25}) for seed in "12"],
        "ppo: Not the same on every task: sticky: "
        "`(absent)`: ppo (seeds 1, 2 of Breakout); `0.25`: ppo (seeds 1, 2 of Pong).",
    ),
    "script": (lambda suite: rewrite(suite / "ppo/Pong/2", script="other.py"), "ppo: Mixed script: `some_script.py`: "),
    "unknown game": (
        lambda suite: write_run(suite, "ppo", "MountainCar-v0", 1, [1] * 100, env_id="MountainCar-v0"),
        "No score of a random player and of a human, or of who solves it, known: "
        "raw returns only, in no aggregate: MountainCar-v0.",
    ),
    "seeds": (
        lambda suite: write_run(suite, "ppo", "Pong", 3, [1] * 100),
        "Seeds are not the same everywhere: "
        "ours (seeds 1, 2 of every task), ppo (seeds 1, 2 of Breakout; seeds 1, 2, 3 of Pong).",
    ),
    "steps go back": (
        lambda suite: (suite / "ppo/Pong/2/episodes.csv").write_text("global_step,return,length\n9,1,7\n8,1,7\n"),
        "Left out, as its files cannot be right: ppo/Pong/2: in episodes.csv steps go back",
    ),
    "no config": (
        lambda suite: (suite / "ppo/Pong/2/config.json").unlink(),
        "Left out, as its files cannot be right: ppo/Pong/2: there is no config.json.",
    ),
    "half a config": (
        lambda suite: (suite / "ppo/Pong/2/config.json").write_text('{"script": "some_script.py", "args": {}}'),
        "Left out, as its files cannot be right: ppo/Pong/2: config.json lacks device, git_commit, ",
    ),
    "no environment": (
        lambda suite: (suite / "ppo/Pong/2/config.json").write_text(json.dumps(CONFIG)),
        "Left out, as its files cannot be right: ppo/Pong/2: args of config.json lacks env_id.",
    ),
    "versions unknown": (
        lambda suite: rewrite(suite / "ppo/Pong/2", versions=None),
        "Left out, as its files cannot be right: ppo/Pong/2: versions of config.json is no JSON object.",
    ),
    "an empty done file": (
        lambda suite: (suite / "ppo/Pong/2/done.json").write_text("{}"),
        "Left out, as its files cannot be right: ppo/Pong/2: done.json lacks minutes, sps, steps.",
    ),
    "a speed that is none": (
        lambda suite: (suite / "ppo/Pong/2/done.json").write_text('{"steps": 1280, "minutes": 1, "sps": NaN}'),
        "Left out, as its files cannot be right: ppo/Pong/2: in done.json a value is not a finite number.",
    ),
    "a return that is none": (
        lambda suite: (suite / "ppo/Pong/2/episodes.csv").write_text("global_step,return,length\n7,nan,7\n8,1,7\n"),
        "Left out, as its files cannot be right: ppo/Pong/2: in episodes.csv a return is not a finite number.",
    ),
    "no episodes file": (
        lambda suite: (suite / "ppo/Pong/2/episodes.csv").unlink(),
        "Left out, as its files cannot be right: ppo/Pong/2: there is no episodes.csv.",
    ),
    "episodes without a header": (
        lambda suite: (suite / "ppo/Pong/2/episodes.csv").write_text("7,1,7\n"),
        "Left out, as its files cannot be right: ppo/Pong/2: ",
    ),
    "half a done file": (
        lambda suite: (suite / "ppo/Pong/2/done.json").write_text('{"steps": 1'),
        "Left out, as its files cannot be right: ppo/Pong/2: ",
    ),
}


@pytest.mark.parametrize("change, remark", UNEVEN.values(), ids=UNEVEN)
def test_every_unevenness_is_said(suite, change, remark):
    assert not any(text.startswith(remark) for text in remarks_of(suite))
    change(suite)
    assert any(text.startswith(remark) for text in remarks_of(suite)), remarks_of(suite)


def test_what_is_meant_to_differ_and_packages_of_one_script_are_no_unevenness(suite):
    mean_it(suite, {"sticky": "0.250", "precision": "bf16"})
    for seed in "12":
        rewrite(suite / "ppo/Pong" / seed, args={"sticky": 0.25}, precision="bf16")
        for task in ("Pong", "Breakout"):
            versions = CONFIG["versions"] | {"stable_baselines3": "2.9"}
            rewrite(suite / "ours" / task / seed, script="peer.py", versions=versions)
    assert len(remarks_of(suite)) == 1 and remarks_of(suite)[0].startswith("Nothing: ")


def test_seeds_that_were_planned_unlike_are_said(suite):
    for seed, clip in (("1", 0.2), ("2", 0.3)):
        plan = json.loads((suite / "plan.json").read_text())
        ours = [run for run in plan if (run["algorithm"], run["label"], str(run["seed"])) == ("ppo", "Pong", seed)]
        ours[0]["flags"] = {"clip_coef": clip}
        (suite / "plan.json").write_text(json.dumps(plan))
        rewrite(suite / "ppo/Pong" / seed, args={"clip_coef": clip})
    assert any(text.startswith("ppo: Mixed clip_coef") for text in remarks_of(suite))


def test_a_version_that_one_seed_lacks_is_said(suite):
    rewrite(suite / "ppo/Pong/2", versions={"python": "3.11"})
    assert any(text.startswith("Mixed version of torch: ") for text in remarks_of(suite))


def test_a_run_without_episodes_but_with_an_evaluation_has_a_score(suite):
    for folder in suite.glob("*/*/[12]"):
        (folder / "evaluation.csv").write_text("policy,return,length,ended\nsampled,5,7,1\n")
    (suite / "ppo/Pong/2/episodes.csv").write_text("global_step,return,length\n")
    report.write_report(suite, suite / "report", resamples=50)
    row = next(r for r in read_csv(suite / "report/tasks.csv") if (r["task"], r["algorithm"]) == ("Pong", "ppo"))
    assert (row["seeds"], float(row["score"])) == ("2", 5.0)
    assert "No episode ended in training: ppo (seed 2 of Pong)." in remarks_of(suite)


def test_a_table_without_rows_is_set():
    table = document.table_as_latex(document.Table(["a", "b---c"], []))
    assert r"\begin{tabular}{ll}" in table and "b-{}-{}-c" in table


def test_one_task_has_no_aggregate(tmp_path):
    for algorithm in ("ppo", "ours"):
        for seed in (1, 2):
            write_run(tmp_path, algorithm, "Pong", seed, [1] * 100)
    report.write_report(tmp_path, tmp_path / "report", resamples=50)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "None: there is one task, Pong." in text and "Sample efficiency" not in text
    assert not (tmp_path / "report" / "aggregates.csv").exists()


def test_a_mean_over_unequal_lengths_is_marked_where_it_stands(suite):
    (suite / "ppo" / "Pong" / "2" / "done.json").write_text('{"steps": 2560, "minutes": 1, "sps": 1}')
    table = report.task_table(runs.read_results(suite), suite)[-1]
    steps = {(row[0], row[1]): row[3] for row in table.rows}
    assert steps["Pong", "ppo"] == "UNEQUAL: 1,280 to 2,560" and steps["Pong", "ours"] == "1,280"


def test_a_game_that_one_algorithm_lacks_is_in_no_aggregate(suite):
    write_run(suite, "ppo", "Boxing", 1, [1] * 100)
    results = runs.read_results(suite)
    rectangle = aggregation.choose_rectangle(results, results.tasks, "Aggregates")
    assert set(rectangle.tasks) == {"Breakout", "Pong"} and rectangle.seeds == {"ppo": [1, 2], "ours": [1, 2]}
    assert rectangle.remarks == ["Aggregates: Boxing is left out, as ours has no score there."]


def test_tasks_without_a_scale_get_no_aggregate_but_ranks_and_curves(tmp_path):
    for algorithm, score in (("ppo", 10), ("ours", 20)):
        for seed in (1, 2):
            write_run(tmp_path, algorithm, "MountainCar-v0", seed, [score] * 100, env_id="MountainCar-v0")
    report.write_report(tmp_path, tmp_path / "report", resamples=50)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "None: no task with a known score of a random player and of a human, or of who solves it, has" in text
    assert "| ours | ppo | 1 | 1.000 [0.342, 1.000] |" in text  # 2 / (2 + 1.96²)
    assert not (tmp_path / "report" / "aggregates.csv").exists()
    assert (tmp_path / "report" / "learning_curves.png").exists()
    (row,) = [row for row in read_csv(tmp_path / "report" / "tasks.csv") if row["algorithm"] == "ours"]
    assert row["last_100"] == "20" and not {"human_normalised", "normalised", "published_ppo"} & row.keys()


def test_an_unknown_baseline_is_refused(suite):
    with pytest.raises(ValueError, match="no run of 'absent'; there are ppo, ours"):
        report.write_report(suite, suite / "report", baseline="absent", resamples=50)


def test_without_ppo_or_another_baseline_there_is_no_improvement(tmp_path):
    write_run(tmp_path, "ours", "Pong", 1, [1] * 100)
    report.write_report(tmp_path, tmp_path / "report", resamples=50)
    assert "None: it takes runs of `ppo`" in (tmp_path / "report" / "report.md").read_text()


def test_scores_of_games_that_began_early_are_remarked_on(tmp_path):
    """100 games of 10 steps end at 10, 20, ... 1,000; with 90 environments they began 900 steps before."""
    for algorithm, num_envs in (("wide", 90), ("narrow", 1)):
        write_run(tmp_path, algorithm, "Pong", 1, [1] * 100, steps=2000, args={"num_envs": num_envs})
    (remark,) = uneven.early_episodes(runs.read_results(tmp_path))
    assert remark.startswith("Up to 100% of the last 100 episodes began in the first half")
    assert "narrow" in remark and "wide" in remark
    for run in runs.read_results(tmp_path).runs:
        assert run.began_early == 1.0
    (tmp_path / "narrow" / "Pong" / "1" / "done.json").write_text('{"steps": 1000, "minutes": 1, "sps": 1}')
    shares = {run.algorithm: run.began_early for run in runs.read_results(tmp_path).runs}
    assert shares == {"wide": 1.0, "narrow": 0.5}  # those that ended at 10 to 500 began at 0 to 490
    (remark,) = uneven.early_episodes(runs.read_results(tmp_path))
    assert "wide" in remark and "narrow" not in remark


def test_runs_without_any_episode_are_reported_on(tmp_path):
    write_run(tmp_path, "ppo", "Pong", 1, [])
    report.write_report(tmp_path, tmp_path / "report", resamples=50)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "No episode ended in training, so there is no score: ppo (seed 1 of Pong)." in text


def test_no_curve_where_the_shortest_run_ends_before_another_has_an_episode(suite):
    for algorithm, steps in (("ppo", STEPS), ("ours", 5)):
        write_run(suite, algorithm, "Boxing", 1, [1] * 100, steps=steps)
    report.write_report(suite, suite / "report", resamples=50)
    text = (suite / "report" / "report.md").read_text()
    assert (
        "None: in some run hardly an episode has ended by the end of its task's shortest run (points that all have: 0)."
        in text
    )
    assert not (suite / "report" / "sample_efficiency.csv").exists()


def test_nothing_finished_is_refused(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "ppo", "Pong", 1, [1], done=False)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as refused:
        report.main()
    assert refused.value.code == 2
    assert "no finished run (1 unfinished, 0 unreadable, 0 broken)" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("[{", "JSONDecodeError"),
        ('[{"algorithm": "ppo", "seed": 1}]', "label"),
        ("[1]", "TypeError"),
        ("1", "TypeError"),
    ],
)
def test_a_broken_plan_is_refused_in_one_line(suite, monkeypatch, capsys, plan, why):
    (suite / "plan.json").write_text(plan)
    monkeypatch.setattr(sys, "argv", ["report", str(suite)])
    with pytest.raises(SystemExit) as refused:
        report.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert refused.value.code == 2 and str(suite / "plan.json") in line and why in line


def test_known_scores_are_57_games():
    known = runs.read_known_scores()
    assert len(known) == 57
    assert known["Alien"] == {"random": 227.8, "human": 7127.7, "published_ppo": 1498.9583333333333}
    assert all(scores["human"] > scores["random"] for scores in known.values())
    # the flaw: just the games in which the authors' PPO never got above zero
    zeros = {game for game, scores in known.items() if scores["published_ppo"] == 0}
    assert zeros == {"DoubleDunk", "FishingDerby", "IceHockey", "Pitfall", "Pong", "Skiing", "Surround", "Tennis"}


# Scale


def test_synthetic_suite_is_complete_and_even(tmp_path):
    episodes = synthetic.make_suite(tmp_path, games=2, algorithms=2, seeds=2, steps=300_000)
    results = runs.read_results(tmp_path)
    assert len(results.runs) == 8 and sum(run.episodes for run in results.runs) == episodes
    assert remarks_of(tmp_path)[0].startswith("Nothing: ")


@pytest.mark.slow
def test_a_full_suite_fits_in_two_gigabytes():
    measured = (
        "import resource, runpy; runpy.run_module('benchmark.report', run_name='__main__', alter_sys=True);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    with tempfile.TemporaryDirectory() as folder:  # 300 MB, which pytest's own would keep
        synthetic.make_suite(Path(folder), games=57, algorithms=4, seeds=5, steps=10_000_000)
        command = [sys.executable, "-c", measured, folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        kilobytes = int(done.stdout.splitlines()[-1]) / (1024 if sys.platform == "darwin" else 1)
        assert kilobytes < 2e6
        rows = read_csv(Path(folder) / "report" / "aggregates.csv")
    assert len(rows) == 16 and all(row["tasks"] == "57" and row["seeds"] == "5" for row in rows)
