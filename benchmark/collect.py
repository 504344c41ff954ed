"""Turn finished runs into committed tables: python -m benchmark.collect RUNS_DIR --out benchmark/results/NAME

Writes NAME.csv (one line per run: settings, result, cost, versions), NAME_curves.csv (mean return of the episodes that
ended in each of 50 equal parts of the run) and NAME_metrics.csv (every logged metric, averaged over 10 parts). What the
tables have already stays in them, unless the same script, environment and seed was run again.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CURVE_PARTS, METRIC_PARTS = 50, 10
# Arguments with a column of their own, or that change nothing of what is learned but its rounding.
NAMES_OF_A_RUN = ("env_id", "seed", "runs_dir", "run_name", "track", "checkpoint_interval", "resume", "compile")
CIRCUMSTANCES = ("device", "precision", "torch_threads", "machine", "git_commit")  # of config.json, beside `versions`


def is_finished(run_dir: Path) -> bool:
    """Whether the run has logged its last step and written its weights, which one stopped by a bad loss has too."""
    if not (run_dir / "agent.pt").exists():
        return False
    args = json.loads((run_dir / "config.json").read_text())["args"]
    rollout = args["num_envs"] * args["num_steps"]
    logged = read_events(run_dir).get("charts/SPS")
    return logged is not None and logged[0][-1] == args["total_timesteps"] // rollout * rollout


def read_events(run_dir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of every metric of a run, but for the single episodes, which episodes.csv has."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {}
    for tag in sorted(events.Tags()["scalars"]):
        if not tag.startswith("charts/episodic_"):
            points = events.Scalars(tag)
            scalars[tag] = np.array([p.step for p in points]), np.array([p.value for p in points])
    return scalars


def parts(steps: np.ndarray, values: np.ndarray, last_step: int, count: int) -> list[tuple[int, float]]:
    """Mean of the values whose step lies in each of `count` equal parts of (0, last_step]; empty parts are left out."""
    edges = np.linspace(0, last_step, count + 1)
    part = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, count - 1)
    return [(round(edges[i + 1]), float(values[part == i].mean())) for i in range(count) if (part == i).any()]


def settings_text(args: dict) -> str:
    """A run's settings as one cell: every argument but those that name the run."""
    return " ".join(f"{name}={value}" for name, value in args.items() if name not in NAMES_OF_A_RUN)


def circumstances(config: dict) -> dict:
    """What a run was computed with and on, as cells of a table."""
    versions = " ".join(f"{name}={version}" for name, version in config["versions"].items())
    return {name: config[name] for name in CIRCUMSTANCES} | {"versions": versions}


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean over seeds by Student's t, values (seeds, ...) → low, high (...); nan for one seed.

    The percentile bootstrap would cover the mean of ten normal values in only 90 % of cases, of three in 75 %.
    """
    seeds = len(values)
    half = stats.t.ppf(0.975, seeds - 1) * values.std(axis=0, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan
    return values.mean(axis=0) - half, values.mean(axis=0) + half


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_table(path: Path, rows: list[dict], runs: set[tuple]) -> None:
    """Write the rows of `runs` in place of what the table had of them, sorted by run; the other runs' rows stay."""

    def run_of(row: dict) -> tuple[str, str, int]:
        return row["script"], row["env_id"], int(row["seed"])

    rows = [row for row in read_table(path) if run_of(row) not in runs] + rows
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=run_of))


def collect(runs_dir: Path, out: Path) -> int:
    """Write the three tables of all finished runs below `runs_dir`; return their number."""
    summary, curves, metrics, runs = [], [], [], set()
    run_dirs = sorted(path.parent for path in runs_dir.rglob("config.json"))
    for run_dir in filter(is_finished, run_dirs):
        config = json.loads((run_dir / "config.json").read_text())
        args = config["args"]
        key = {"script": config["script"], "env_id": args["env_id"], "seed": args["seed"]}
        runs.add(tuple(key.values()))
        events = read_events(run_dir)
        last_step, sps = events["charts/SPS"][0][-1], events["charts/SPS"][1][-1]
        episodes = np.loadtxt(run_dir / "episodes.csv", delimiter=",", skiprows=1, ndmin=2).reshape(-1, 3)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmark.collect", description=__doc__.splitlines()[0])
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="benchmark/results/NAME")
    arguments = parser.parse_args()
    print(f"{collect(arguments.runs_dir, arguments.out)} finished runs in {arguments.out}*.csv")
