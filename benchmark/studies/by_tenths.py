"""Medians of logged metrics in each tenth of training, kept as a CSV file: for long, auxiliary and parallelism."""

import csv
import json
from pathlib import Path

import numpy as np

from benchmark.common import read_events, read_table
from benchmark.studies.transition import TENTHS, tenths

# Of a script whose ℓ_P is a sum over the latent, its size, by which the table divides. DeepMDP's and DBC's are means.
LATENT_SIZE = {
    "deep_spi_ppo.py": 32,
    "deep_spi_ppo_coverage.py": 32,
    "deep_spi_ppo_atari.py": 7 * 7 * 64,
    "deep_spi_ppo_atari_coverage.py": 7 * 7 * 64,
    "deepmdp_ppo_atari.py": 1,
    "dbc_ppo_atari.py": 1,
}


def rows_of(run_dir: Path, key: dict[str, str], metrics: dict[str, str], last_step: int | None = None) -> list[dict]:
    """Ten rows of a run: the key, and the median of each metric (column → metric) that it logged, else empty cells.

    Tenths are of the run up to last_step, by default the last that it logged. No rows if it logged none of the metrics.
    Raises KeyError if it logged ℓ_P and its script is not in LATENT_SIZE.
    """
    script = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["script"]
    events = read_events(run_dir)
    last_step = last_step or int(events["charts/SPS"][0][-1])
    columns = {name: tenths(*events[metric], last_step) for name, metric in metrics.items() if metric in events}
    for name in (name for name, metric in metrics.items() if "/transition_loss" in metric and name in columns):
        columns[name] = columns[name] / LATENT_SIZE[script]
    return [
        key | {"tenth": i + 1} | {name: f"{columns[name][i]:.6g}" if name in columns else "" for name in metrics}
        for i in range(TENTHS if columns else 0)
    ]


def add(file: Path, rows: list[dict]) -> None:
    """Add the rows to the file, in place of those of the same runs. What stands before `tenth` names a run."""
    if not rows:
        return
    key = list(rows[0])[: list(rows[0]).index("tenth")]
    new = {tuple(row[name] for name in key) for row in rows}
    rows = rows + [row for row in read_table(file) if tuple(row[name] for name in key) not in new]
    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (*(row[name] for name in key), int(row["tenth"]))))


def column(file: Path, tenth: int, name: str, **key: str) -> np.ndarray:
    """A column's values in one tenth, (seeds,), of the runs that the key names; of no length where there are none."""
    rows = (row for row in read_table(file) if int(row["tenth"]) == tenth and key.items() <= row.items())
    return np.array([float(row[name]) for row in rows if row[name]])
