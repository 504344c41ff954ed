"""Turn finished runs into committed tables: python -m benchmark.collect RUNS_DIR --out benchmark/results/NAME

Writes NAME.csv (one line per run: settings, result, cost, versions), NAME_curves.csv (mean return of the episodes that
ended in each of 50 equal parts of the run) and NAME_metrics.csv (every logged metric, averaged over 10 parts). What the
tables have already stays in them, unless the same script, environment and seed was run again.
"""

import argparse
import csv
import json
from pathlib import Path

from benchmark.common import CURVE_PARTS, circumstances, parts, read_episodes, read_events, read_table, settings_text

METRIC_PARTS = 10


def is_finished(run_dir: Path) -> bool:
    """Whether the run has logged its last step and written its weights, which one stopped by a bad loss has too."""
    if not (run_dir / "agent.pt").exists():
        return False
    args = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["args"]
    rollout = args["num_envs"] * args["num_steps"]
    logged = read_events(run_dir).get("charts/SPS")
    return logged is not None and logged[0][-1] == args["total_timesteps"] // rollout * rollout


def write_table(path: Path, rows: list[dict], runs: set[tuple]) -> None:
    """Write the rows of `runs` in place of what the table had of them, sorted by run; the other runs' rows stay."""

    def run_of(row: dict) -> tuple[str, str, int]:
        return row["script"], row["env_id"], int(row["seed"])

    rows = [row for row in read_table(path) if run_of(row) not in runs] + rows
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=run_of))


def collect(runs_dir: Path, out: Path) -> int:
    """Write the three tables of all finished runs below `runs_dir`; return their number."""
    summary, curves, metrics, runs = [], [], [], set()
    run_dirs = sorted(path.parent for path in runs_dir.rglob("config.json"))
    for run_dir in filter(is_finished, run_dirs):
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        args = config["args"]
        key = {"script": config["script"], "env_id": args["env_id"], "seed": args["seed"]}
        runs.add(tuple(key.values()))
        events = read_events(run_dir)
        last_step, sps = events["charts/SPS"][0][-1], events["charts/SPS"][1][-1]
        episodes = read_episodes(run_dir)
        result = {
            "steps": last_step,
            "mean_return_last_100": f"{episodes[-100:, 1].mean():.2f}" if len(episodes) else "",
            "episodes": len(episodes),
            "minutes": f"{last_step / sps / 60:.2f}",
            "sps": f"{sps:.0f}",
        }
        summary.append(key | result | circumstances(config) | {"settings": settings_text(args)})
        for step, value in parts(episodes[:, 0], episodes[:, 1], last_step, CURVE_PARTS):
            curves.append(key | {"step": step, "mean_return": f"{value:.3f}"})
        for tag, (steps, values) in events.items():
            for step, value in parts(steps, values, last_step, METRIC_PARTS):
                metrics.append(key | {"metric": tag, "step": step, "value": f"{value:.6g}"})
    for suffix, rows in (("", summary), ("_curves", curves), ("_metrics", metrics)):
        if rows:
            write_table(out.with_name(f"{out.name}{suffix}.csv"), rows, runs)
    return len(summary)


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.collect", description=__doc__.splitlines()[0])
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="benchmark/results/NAME")
    arguments = parser.parse_args(words)
    print(f"{collect(arguments.runs_dir, arguments.out)} finished runs in {arguments.out}*.csv")
