"""The picture of suite `control`: its curves have the seeds in one order, so that differences are paired."""

import numpy as np
import pytest

from benchmark.common import CURVE_PARTS
from benchmark.report.runs import read_results
from benchmark.studies import control
from benchmark.suites import CONTROL_TASKS


@pytest.fixture(scope="module")
def curves():
    return control.curves()


def test_every_task_has_all_placements_at_the_same_steps(curves):
    assert set(curves) == {task.label for task in CONTROL_TASKS}
    for algorithms in curves.values():
        assert set(algorithms) == set(control.PLACEMENTS.values())
        steps = [list(steps) for steps, _ in algorithms.values()]
        assert steps[0] == steps[1] == steps[2] == sorted(steps[0]) and len(steps[0]) > 40
        assert all(returns.shape == (10, len(steps[0])) for _, returns in algorithms.values())


def test_a_row_is_the_run_of_that_seed(curves):
    """The last point of each curve against a plain mean over that run's games."""
    checked = 0
    for run in read_results(control.FOLDER).runs:
        if run.task != "LunarLander-v3-sticky0.25":
            continue
        steps, returns = curves[run.task][run.algorithm]
        last = run.done["steps"]
        games = [r for end, r in zip(run.ends, run.returns, strict=True) if end > last * (1 - 1 / CURVE_PARTS)]
        assert steps[-1] == last and returns[run.seed - 1, -1] == pytest.approx(np.mean(games))
        checked += 1
    assert checked == 30


def test_the_table_of_gated_has_welchs_intervals():
    def scores(**algorithms):
        return {"CartPole-v1": {name: {control.LAST: np.array(values)} for name, values in algorithms.items()}}

    table = control.gated_table(
        scores(deep_spi=[500.0, 498, 499], additive=[490.0, 490, 490]), scores(gated=[495.0, 496, 497])
    )
    (line,) = table.splitlines()[2:]
    # both vary by 1: the difference's standard error is √(2/3), with four degrees of freedom: half width 2.776 · 0.816
    assert "| 3 | 496.0 [493.5, 498.5] | -3.0 [-5.3, -0.7], p 0.021 |" in line
    assert "| +6.0 [+3.5, +8.5], p 0.009 |" in line  # additive is constant: Student's, two degrees of freedom
