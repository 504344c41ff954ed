"""Differences of algorithms against scipy's own tests and against repetition."""

import shutil

import numpy as np
import pytest
from scipy import stats

from benchmark.report import differences
from benchmark.report.scores import ALL, FINAL, LAST, LEVEL, POWER, SEED, cell, difference, read_scores, visible_effect
from benchmark.studies.control import placement_difference_table, placement_score_table
from benchmark.studies.early import score_table
from tests.synthetic import make_suite


def test_difference_is_welchs():
    a, b = np.array([1.0, 2.0, 6.0]), np.array([2.0, 2.5, 3.5, 4.0])
    mean, low, high = difference(a, b)
    assert mean == 0.0
    variances = a.var(ddof=1) / 3, b.var(ddof=1) / 4  # Welch and Satterthwaite, by hand
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(variances))
    np.testing.assert_allclose((low, high), (-half, half))


def test_an_effect_as_large_as_visible_is_found_as_often_as_promised():
    a, b = np.array([-1.0, 0.0, 1.0]), np.array([9.0, 10.0, 11.0])  # of standard deviation 1
    effect = visible_effect(a, b)
    rng = np.random.default_rng(0)
    repeated = stats.ttest_ind(
        rng.normal(0, 1, (20_000, 3)), rng.normal(effect, 1, (20_000, 3)), axis=1, equal_var=False
    )
    assert abs((repeated.pvalue < LEVEL).mean() - POWER) < 0.01
    np.testing.assert_allclose(visible_effect(10 * a, 10 * b), 10 * effect)


def test_runs_that_are_all_alike_differ_by_their_constant():
    for alike in (np.array([500.0, 500.0]), np.array([500.0])):
        mean, *interval = difference(alike, np.array([499.0, 499.0, 499.0]))
        assert mean == 1.0
        assert np.isnan(interval).all()


def test_a_side_that_never_varies_is_a_constant():
    """Welch's formula by hand, with one variance 0: the other's standard error, and its degrees of freedom."""
    a, constant = np.array([1.0, 2.0, 6.0]), np.full(4, 2.5)
    half = stats.t.ppf(0.975, 2) * a.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(difference(a, constant), (0.5, 0.5 - half, 0.5 + half))
    np.testing.assert_allclose(difference(constant, a), (-0.5, -0.5 - half, -0.5 + half))
    nearly = difference(a, constant + np.array([0, 0, 0, 1e-6]))
    np.testing.assert_allclose(nearly, difference(a, constant), atol=1e-4)
    assert visible_effect(a, constant) == pytest.approx(visible_effect(constant, a), rel=0.05)  # by simulation


def test_no_effect_is_visible_to_one_run_a_side_or_where_one_has_no_score():
    for a in (np.array([1.0]), np.array([1.0, np.nan]), np.array([0.1, 0.1, 0.1])):
        assert np.isnan(visible_effect(a, np.array([0.1, 0.1, 0.1])))
        assert np.isnan(difference(a, np.array([0.1, 0.1, 0.1]))[1:]).all()
    alone = {"ppo": 1.0, "additive": 2.0, "deep_spi": 4.0}
    scores = {"A": {name: dict.fromkeys((LAST, ALL, SEED), np.array([own])) for name, own in alone.items()}}
    assert f"| A | {LAST} | +3.0 |  |  | +2.0 |  |  |" in placement_difference_table(scores)


def test_placement_tables_have_the_numbers_of_their_own_task():
    """Two seeds: the half width is t(1) = 12.706 standard errors; Welch's of equal variances has two degrees: 4.303."""
    returns = {"ppo": (1.0, 3.0), "additive": (3.0, 5.0), "deep_spi": (6.0, 8.0)}
    seeds = {"ppo": (2, 3), "additive": (1, 2), "deep_spi": (1, 2)}
    scores = {
        task: {
            name: {LAST: factor * np.array(own), ALL: np.array(own)[::-1] / 2, SEED: np.array(seeds[name])}
            for name, own in returns.items()
        }
        for task, factor in (("A", 1), ("B", 10))
    }
    scores["A"]["additive"][ALL] = np.array([1.5, 2.5])
    rows = placement_score_table(scores).splitlines()[2:]
    assert rows[0] == f"| A | {LAST} |  | 2.0 [-10.7, 14.7] | 4.0 [-8.7, 16.7] | 7.0 [-5.7, 19.7] |"
    assert rows[1].startswith(f"| A | {ALL} |  | 1.0 [-5.4, 7.4] |")
    assert rows[2].startswith(f"| B | {LAST} |  | 20.0 [-107.1, 147.1] |")
    rows = placement_difference_table(scores).splitlines()[2:]
    seen = visible_effect(np.array([6.0, 8.0]), np.array([1.0, 3.0]))
    p = [2 * stats.t.sf(far / np.sqrt(2), 2) for far in (5, 3)]
    expected = f"+5.0 [-1.1, +11.1], p {p[0]:.3f} |  | {seen:.1f} | +3.0 [-3.1, +9.1], p {p[1]:.3f} |  | {seen:.1f} |"
    assert rows[0] == f"| A | {LAST} | {expected}"
    assert "| +1.5 [-1.5, +4.5], p 0.168 | [-11.2, +14.2] |" in rows[1]  # 2.5 and 0.5: a half width of 12.706
    assert rows[2].startswith(f"| B | {LAST} | +50.0 [-10.8, +110.8], p {p[0]:.3f} |  | {10 * seen:.1f} |")


def test_placement_tables_count_solved_seeds_and_see_no_effect_where_nothing_varies():
    always, sometimes = np.array([500.0, 500.0, 500.0]), np.array([474.9, 475.0, 500.0])
    scores = {"CartPole-v1": {name: {LAST: always, ALL: always, SEED: np.arange(3)} for name in ("ppo", "deep_spi")}}
    scores["CartPole-v1"]["additive"] = {LAST: sometimes, ALL: sometimes, SEED: np.arange(3)}
    last, over_all = placement_score_table(scores).splitlines()[2:]
    assert last.startswith(f"| CartPole-v1 | {LAST} | >= 475 | 500.0; 3 of 3 | 483.3 [")
    assert "; 2 of 3 |" in last
    assert over_all.startswith(f"| CartPole-v1 | {ALL} |  | 500.0 | 483.3 [")
    row = placement_difference_table(scores).splitlines()[2]
    assert row.startswith(f"| CartPole-v1 | {LAST} | +0.0 |  |  | +16.7 [")


def test_a_final_policy_counts_by_its_sampled_games_once_every_seed_was_evaluated(tmp_path):
    make_suite(tmp_path, games=1, algorithms=1, seeds=2, steps=1_000_000)
    first, second = sorted((tmp_path / "ppo").glob("*/*"))
    (first / "evaluation.csv").write_text("policy,return,length,ended\ngreedy,9,1,1\nsampled,1,1,1\nsampled,2,1,1\n")
    ((task, algorithms),) = read_scores(tmp_path).items()
    assert algorithms["ppo"].keys() == {LAST, ALL, SEED}
    assert f"| ppo | 2 |  | {algorithms['ppo'][LAST].mean():.0f} [" in score_table({task: algorithms})
    (second / "evaluation.csv").write_text("policy,return,length,ended\nsampled,7,1,1\n")
    np.testing.assert_array_equal(read_scores(tmp_path)[task]["ppo"][FINAL], [1.5, 7.0])


def test_any_suite_has_a_table_against_a_baseline(tmp_path, capsys):
    make_suite(tmp_path, games=2, algorithms=3, seeds=3, steps=1_000_000)
    differences.main([str(tmp_path)])
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()]
    assert "less ppo" in rows[0] and len(rows) == 2 + 2 * 3
    scores = read_scores(tmp_path)
    task, outcome, name, seeds, _, compared, _ = rows[3]
    a, b = scores[task][name][outcome], scores[task]["ppo"][outcome]
    assert (outcome, name, seeds) == (LAST, "made_up_2", "3")
    assert compared.startswith(f"{a.mean() - b.mean():+,.1f} [")
    differences.main([str(tmp_path), "--baseline", "made_up_3"])
    assert "less made_up_3" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        differences.main([str(tmp_path), "--baseline", "absent"])
    assert refused.value.code == 2 and "made_up_2" in capsys.readouterr().err


def test_no_algorithm_is_left_out_where_a_protocol_has_tables_of_its_own(tmp_path, capsys):
    make_suite(tmp_path, games=1, algorithms=4, seeds=2, steps=1_000_000)
    for made_up, name in (("made_up_2", "additive"), ("made_up_3", "deep_spi")):
        (tmp_path / made_up).rename(tmp_path / name)
    differences.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Deep SPI − additive" in printed and "| made_up_4 | 2 |" in printed
    shutil.rmtree(tmp_path / "made_up_4")
    differences.main([str(tmp_path)])
    assert "less ppo" not in capsys.readouterr().out


def test_no_difference_is_negative_zero():
    a, b = np.array([1.0, 2.0]), np.array([1.0, 2.0 + 1e-9])
    assert cell(*difference(a, b), "+z.1f").startswith("+0.0 [")
    scores = {"A": {name: {LAST: a, ALL: a, SEED: np.arange(2)} for name in ("ppo", "additive", "deep_spi")}}
    scores["A"]["ppo"] = scores["A"]["ppo"] | {LAST: b}
    assert "-0.0" not in placement_difference_table(scores) + placement_score_table(scores)
