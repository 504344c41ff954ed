"""Tests of benchmark/studies/confounding_mechanism.py: falls are put down to their causes, and runs are made once."""

import numpy as np
import pytest

import confounding_gridworld as cg
from benchmark.studies import confounding
from benchmark.studies import confounding_mechanism as mechanism


@pytest.fixture
def history():
    """Three updates: UP at the bottom '!' while φ merges the two, that undone, and waiting at the start."""
    world = cg.make_gridworld(5, 0.2, 0.99)
    pi = np.tile(np.eye(4)[cg.RIGHT], (4, len(world.P), 1))
    pi[1, world.critical[1]] = [0.5, 0, 0, 0.5]
    pi[3, world.start] = [0, 0, 0.5, 0.5]
    V = cg.value(world.P, world.R, pi, 0.99)
    return cg.History(V, pi, np.array([0.1, 0.9, 1.1, 0.8]), np.array([0.1, 0.2, 0.3]))


def test_falls_are_put_down_to_their_causes(history):
    world = cg.make_gridworld(5, 0.2, 0.99)
    found = mechanism.measures(history, world, 0.99)
    V = history.V[:, world.start]
    by_bottom, by_waiting = V[0] - V[1], V[2] - V[3]
    assert by_bottom > 1 > by_waiting > 0 and V[2] == V[0]
    assert found["decrease"] == pytest.approx(by_bottom + by_waiting)
    assert found["at_bottom"] == pytest.approx(by_bottom / (by_bottom + by_waiting))
    assert found["while_merged"] == pytest.approx(by_bottom / (by_bottom + by_waiting))
    assert found["drawn_together"] == pytest.approx(by_waiting / (by_bottom + by_waiting))
    assert found["updates_together"] == pytest.approx(1 / 3)
    at_bottom = history.V[0] - history.V[1]
    assert at_bottom.argmax() == world.critical[1]
    assert found["worst_state"] == pytest.approx(at_bottom.max() + by_waiting)
    assert found["penalty"] == pytest.approx(0.2)


def test_curves_are_of_the_two_critical_states(history):
    found = mechanism.curves(history, cg.make_gridworld(5, 0.2, 0.99))
    assert found["up_bottom"].tolist() == [0, 0.5, 0, 0] and found["up_top"].tolist() == [0] * 4
    assert found.keys() == mechanism.CURVES.keys()


def test_runs_are_made_once_and_told(history, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(confounding, "FOLDER", tmp_path)
    monkeypatch.setattr(confounding, "SEEDS", range(1, 3))
    monkeypatch.setattr(cg, "train", lambda args: made.append(args) or ({}, history))
    mechanism.main(["--workers", "1"])
    mechanism.main(["--workers", "1"])
    assert [(args.method, args.seed) for args in made] == [(m, s) for s in (1, 2) for m in cg.METHODS]
    assert (tmp_path / "mechanism.png").exists()
    assert "| Deep SPI | 2 |" in capsys.readouterr().out
