"""Tests of benchmark/differences.py against scipy's own tests and against repetition."""

import numpy as np
from scipy import stats

from benchmark.differences import LEVEL, POWER, difference, visible_effect


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
    repeated = stats.ttest_ind(rng.normal(0, 1, (20_000, 3)), rng.normal(effect, 1, (20_000, 3)), axis=1)
    assert abs((repeated.pvalue < LEVEL).mean() - POWER) < 0.01
    np.testing.assert_allclose(visible_effect(10 * a, 10 * b), 10 * effect)
