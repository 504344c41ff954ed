"""The study of continuous actions: its tables, by hand, and what a table may say of a single seed."""

import numpy as np

from benchmark.report.scores import LAST
from benchmark.studies import mujoco
from benchmark.suites import SUITES


def scores(**algorithms):
    return {"Hopper-v4": {name: {LAST: np.array(values, dtype=float)} for name, values in algorithms.items()}}


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_scores_have_an_interval_from_two_seeds_on():
    several, one = rows(mujoco.score_table(scores(ppo=[1000, 2000, 3000], sb3=[1500])))
    # Student's t with two degrees of freedom: 4.3027 x 1000 / √3 = 2484
    assert several == ["Hopper-v4", "ppo", "3", "2000 [-484, 4484]", "1000, 2000, 3000"]
    assert one == ["Hopper-v4", "sb3", "1", "1500", "1500"]


def test_differences_are_of_two_seeds_a_side_or_more_and_by_welch():
    played = scores(ppo=[1000, 2000, 3000], sb3=[500, 1500, 2500], deep_spi=[4000], additive=[1, 2])
    (row,) = rows(mujoco.difference_table(played))  # Deep SPI has one seed, so that nothing is said of it
    # equal spreads: four degrees of freedom, 2.7764 x 1000 x √(2/3) = 2267
    assert row[:4] == ["Hopper-v4", "PPO − Stable-Baselines3's", "3, 3", "+500 [-1767, +2767]"]
    assert float(row[4]) > 2267


def test_a_seed_a_side_is_no_comparison():
    assert mujoco.difference_table(scores(ppo=[1000], sb3=[500])) == "None yet."


def test_what_the_protocol_compares_is_in_the_suite():
    names = {name for pair in mujoco.COMPARISONS.values() for name in pair}
    assert names == set(SUITES["mujoco"].algorithms)
