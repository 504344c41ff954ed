"""Tests of benchmark/differences.py against scipy's own tests and against repetition."""

import numpy as np
from scipy import stats

from benchmark.differences import ALL, LAST, LEVEL, POWER, difference, placement_table, visible_effect


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


def test_placement_table_has_the_numbers_of_its_own_task():
    """Two seeds: the half width is t(1) = 12.706 standard errors; Welch's of equal variances has two degrees: 4.303."""
    scores = {"ppo": (1.0, 3.0), "additive": (3.0, 5.0), "deep_spi": (6.0, 8.0)}
    table = placement_table(
        {
            task: {name: {LAST: factor * np.array(own), ALL: np.array(own) / 2} for name, own in scores.items()}
            for task, factor in (("A", 1), ("B", 10))
        }
    )
    rows = table.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| A", "| A", "| B", "| B"]
    means = "| 2.0 [-10.7, 14.7] | 4.0 [-8.7, 16.7] | 7.0 [-5.7, 19.7] "
    assert means + "| +5.0 [-1.1, +11.1] | +3.0 [-3.1, +9.1] |" in rows[0]
    assert "| 1.0 [-5.4, 7.4] |" in rows[1]
    assert "| 20.0 [-107.1, 147.1] |" in rows[2]
