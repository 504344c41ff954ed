"""The count of broken promises, by hand."""

import csv

from benchmark.studies import theory


def test_a_promise_is_broken_where_the_real_gain_is_below_the_model_s_minus_zeta(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "FILE", tmp_path / "planning_bound.csv")
    policies = [
        ("inside, planner", 1.0, 1.5, 0.5),
        ("inside, planner", 1.0, 1.5, 0.6),
        ("outside, random", 0.0, 1.0, 0.9),
    ]
    names = "real improvement", "model improvement", "zeta"
    with open(theory.FILE, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("section", "case", "quantity", "x", "value"))
        writer.writerows((3, case, name, 40, x) for case, *xs in policies for name, x in zip(names, xs, strict=True))
        writer.writerow((3, "planner, 10 latents", "zeta", 1.1, 0.7))  # of another part of the study
    lines = [line.strip("| ").split(" | ") for line in theory.table().splitlines()[2:]]
    assert lines == [
        ["inside", "planner", "2", "0"],  # one of them is just as good as promised
        ["outside", "random", "1", "1"],
        ["inside", "all", "2", "0"],
        ["outside", "all", "1", "1"],
    ]
