"""The study of the paper's figure 4: what it reads of a run, and its tables by hand."""

import csv
import itertools

import numpy as np
import pytest
import torch

import confounding_gridworld
from benchmark.common import read_events, read_table
from benchmark.peers import deep_spi_corridors as peer
from benchmark.studies import corridors
from benchmark.suites import SUITES


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(corridors, "FILE", tmp_path / "corridors.csv")
    monkeypatch.setattr(corridors, "CURVES", tmp_path / "corridors_curves.csv")
    monkeypatch.setattr(corridors, "RESULTS", tmp_path)


def write(**arms):
    """A row for each value of an arm; distance a hundredth of it."""
    losses = dict.fromkeys(corridors.LOSSES, "0.5")
    rows = [
        {"suite": "corridors", "arm": arm.replace("_norm", "-norm"), "task": "Corridors-v0", "seed": seed}
        | {"value": value, "distance": value / 100, "drawdown": 1.0, "relative_distance": 0.5}
        | (dict.fromkeys(losses, "") if arm == "ppo" else losses)
        for arm, values in arms.items()
        for seed, value in enumerate(values, 1)
    ]
    with open(corridors.FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_a_run_gives_medians_of_its_last_tenth_and_replaces_its_older_row(tmp_path):
    run_dir = tmp_path / "runs" / "corridors" / "deep_spi" / "Corridors-v0" / "1"
    with pytest.raises(SystemExit, match="no finished run"):
        corridors.collect(tmp_path / "runs")
    small = {"num_envs": 8, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "device": "cpu"}
    peer.train(peer.Args(**small, total_timesteps=64 * 20, run_dir=str(run_dir)))
    (run_dir / "done.json").write_text("{}")
    for _ in range(2):
        assert corridors.collect(tmp_path / "runs") == 1
        (row,) = read_table(corridors.FILE)
    logged = {name: values for name, (_, values) in read_events(run_dir).items()}
    for name, metric in (corridors.OUTCOMES | corridors.LOSSES).items():
        assert float(row[name]) == pytest.approx(np.median(logged[metric][-2:]), rel=1e-4)  # of twenty iterations
    values = logged["corridors/value"]
    agent = peer.Agent(4, 5)
    agent.load_state_dict(torch.load(run_dir / "agent.pt", weights_only=True))
    world = confounding_gridworld.make_gridworld(5, 0.2, 0.99)
    with torch.no_grad():
        z = agent.encode(torch.from_numpy(peer.Games(peer.Args(num_envs=8)).frames)).flatten(1)
    apart = [(z[i] - z[j]).norm().item() for i, j in itertools.combinations(np.flatnonzero(~world.is_terminal), 2)]
    top, bottom = world.critical
    assert float(row["relative_distance"]) == pytest.approx(
        (z[top] - z[bottom]).norm().item() / np.mean(apart), rel=1e-3
    )
    falls = [values[i] - values[j] for i in range(20) for j in range(i, 20)]
    assert float(row["drawdown"]) == pytest.approx(max(falls), abs=1e-4)
    curve = read_table(corridors.CURVES)
    assert len(curve) == 20 and float(curve[7]["value"]) == pytest.approx(values[7], rel=1e-4)
    corridors.draw()
    assert (tmp_path / "corridors.png").stat().st_size > 10_000


def test_tables_have_students_and_welchs_intervals():
    write(ppo=[7, 8, 9], deep_spi=[4, 5, 6], additive=[5])
    ppo, additive, deep_spi = rows(corridors.table())
    # Student's t with two degrees of freedom: 4.3027 / √3 = 2.484
    assert ppo == [
        "PPO",
        "3",
        "4.8",
        "8.00 [5.52, 10.48]",
        "7.00",
        "→ 0",
        "0.080 [0.055, 0.105]",
        "0.50",
        "1.00",
        "",
        "",
    ]
    assert additive[:5] == ["additive", "1", "", "5.00", "5.00"] and additive[-2:] == ["0.5 : 0.5"] * 2
    assert deep_spi[2] == "8.01"
    (row,) = rows(corridors.difference_table())  # of additive there is one seed
    # equal spreads: four degrees of freedom, 2.7764 √(2/3) = 2.267
    assert row[:3] == ["Deep SPI − PPO", "3, 3", "-3.000 [-5.267, -0.733]"] and row[4] == "-0.030 [-0.053, -0.007]"
    assert float(row[3]) > 2.27


def test_the_search_is_scaled_between_always_right_and_the_best():
    found = [
        {"suite": "corridors-search", "arm": arm, "task": "Corridors-v0-eps0.1", "seed": seed, "distance": 0.012}
        | {"value": value}
        for arm, values in {"ppo": (4.8035, 6.5), "deep_spi": (8.0,)}.items()
        for seed, value in enumerate(values, 1)
    ]
    with open(corridors.FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    (row,) = rows(corridors.search_table())  # a setting without a run has no row
    assert (
        row[:2] == ["`--epsilon 0.1`", "4.80"] and row[3].startswith("4.80 (0.00), 6.50 (") and row[4] == "0.012, 0.012"
    )
    # by hand: UP at the top '!', RIGHT everywhere else
    world = confounding_gridworld.make_gridworld(5, 0.1, 0.99)
    policy = np.eye(4)[np.full(len(world.coords), confounding_gridworld.RIGHT)]
    policy[world.critical[0]] = np.eye(4)[confounding_gridworld.UP]
    best = confounding_gridworld.value(world.P, world.R, policy, 0.99)[world.start]
    assert float(row[2]) == pytest.approx(best, abs=0.005)
    assert float(row[5].split("(")[1][:4]) == pytest.approx((8.0 - 4.8035) / (best - 4.8035), abs=0.005)


def test_arms_and_settings_are_those_of_the_protocol():
    assert list(corridors.ARMS) == list(SUITES["corridors"].algorithms)
    search = SUITES["corridors-search"]
    assert len({task.label for task in search.tasks}) == 12 and search.seeds == 2
    assert {name: SUITES["corridors"].algorithms[name] for name in search.algorithms} == search.algorithms
