"""Tables and pictures: what README shows is what the committed results say."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmark import collect, figures, learning_curve

ROOT = Path(__file__).parent.parent


def test_readme_tables_are_regenerated_to_the_same_text():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- table:") == len(figures.TABLES)
    assert figures.with_tables(readme) == readme


def test_bootstrap_interval_covers_the_mean_and_shrinks_with_seeds():
    random = np.random.default_rng(1)
    few, many = random.normal(5, 1, 5), random.normal(5, 1, 500)
    (low_few, high_few), (low_many, high_many) = (figures.bootstrap_interval(values) for values in (few, many))
    assert low_few < few.mean() < high_few and low_many < many.mean() < high_many
    # 500 normal values: the interval is ± 1.96 / sqrt(500) = 0.088 around their mean
    assert (high_many - low_many) == pytest.approx(2 * 1.96 * many.std() / 500**0.5, rel=0.05)
    assert high_few - low_few > 5 * (high_many - low_many)


def test_parts_average_what_lies_in_them():
    steps, values = np.array([1, 5, 10, 11, 40]), np.array([1.0, 2.0, 6.0, 5.0, 7.0])
    assert collect.parts(steps, values, 40, 4) == [(10, 3.0), (20, 5.0), (40, 7.0)]


def test_running_mean():
    assert learning_curve.running_mean(np.array([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [1.0, 1.5, 2.5, 3.5]


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
