"""Keep what a report needs of a suite's finished runs: python -m benchmark.keep FROM TO

Copies plan.json and, of each finished run, done.json, episodes.csv, evaluation.csv and policies.csv if there are, and
config.json without the machine's paths: no weights, no TensorBoard files. A run whose policies have games still to play
is left out, and named. Works both ways: from runs/benchmark/SUITE into benchmark/results/suites/SUITE, to be committed,
and back, where `benchmark.run` then skips these runs and `benchmark.report` reports them.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmark.common import NAMES_OF_A_RUN, read_table
from benchmark.launch.plan import PlannedRun, write_plan
from benchmark.launch.policies import games_on_the_way, unplayed
from benchmark.launch.worker import is_being_made

EVALUATIONS = ("evaluation.csv", "policies.csv")


def finished(source: Path) -> list[Path]:
    """The folders of a suite's finished runs, in order; without those that are still playing, which are named."""
    runs = sorted(path.parent for path in source.glob("*/*/*/done.json") if ".broken-" not in path.parent.name)
    playing = list(filter(is_playing, runs))
    for run_dir in playing:
        print(f"{run_dir} is left out: its policies have games still to play; start its suite again", file=sys.stderr)
    return [run_dir for run_dir in runs if run_dir not in playing]


def is_playing(run_dir: Path) -> bool:
    """Whether its worker is at it, or was stopped before each policy on the way had played its share of games."""
    games = sum(row["policy"] == "sampled" for row in read_table(run_dir / "evaluation.csv"))
    return is_being_made(run_dir) or bool(unplayed(run_dir, games_on_the_way(games)))


def config_to_keep(run_dir: Path) -> dict:
    """The run's config.json without the machine's paths."""
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("script_path", None)
    config["args"] |= {name: "" for name in ("run_dir", "runs_dir") if name in config["args"]}
    return config


def keep(source: Path, target: Path) -> list[Path]:
    """Copy the finished runs below `source`, and return their folders. One that `target` already has is written anew.

    Raises SystemExit(1) if there is nothing to keep, or if `target` has one of the runs unfinished or unlike.
    """
    if not source.is_dir():
        raise SystemExit(f"error: FROM: there is no folder {source}")
    kept = finished(source)
    if not kept:
        raise SystemExit(f"error: FROM: no finished run in {source}; it should be a suite's folder")
    for run_dir in kept:
        copy = target / run_dir.relative_to(source)
        if copy.exists() and not (copy / "done.json").exists():
            raise SystemExit(f"error: TO: {copy} is an unfinished run; move it away")
        config = config_to_keep(run_dir)
        if copy.exists():
            kept_config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
            old, new = (each["args"] | {"script": each["script"]} for each in (kept_config, config))
            if differ := sorted(
                name for name, value in new.items() if name not in NAMES_OF_A_RUN and old.get(name) != value
            ):
                raise SystemExit(f"error: TO: {copy} is a run with another {', '.join(differ)}; move it away")
            if (copy / "episodes.csv").read_bytes() != (run_dir / "episodes.csv").read_bytes():
                for name in EVALUATIONS:
                    (copy / name).unlink(missing_ok=True)  # that of the run which is replaced
        copy.mkdir(parents=True, exist_ok=True)
        (copy / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(run_dir / "episodes.csv", copy / "episodes.csv")
        for name in filter(lambda name: (run_dir / name).exists(), EVALUATIONS):
            shutil.copyfile(run_dir / name, copy / name)
        shutil.copyfile(run_dir / "done.json", copy / "done.json")  # last, as it marks the run as finished
    if (source / "plan.json").exists():
        plan = [PlannedRun(**run) for run in json.loads((source / "plan.json").read_text(encoding="utf-8"))]
        write_plan(target / "plan.json", plan)  # which leaves in it what was planned there
    return kept


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.keep", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="FROM")
    parser.add_argument("target", type=Path, metavar="TO")
    arguments = parser.parse_args(words)
    print(f"{len(keep(arguments.source, arguments.target))} finished runs kept in {arguments.target}")
