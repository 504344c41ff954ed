"""The study of confounding updates: python -m benchmark.confounding

`confounding_gridworld.py` in the settings of GRID, each with three methods and seeds 1 to 10. Protocol, fixed before
the runs. Primary outcome: the largest drawdown of V(start) in the setting "centre", as two differences paired by seed,
Deep SPI − additive and Deep SPI − PPO, each with Student's 95 % interval of its mean over the ten seeds. Every other
interval is exploratory: there are hundreds, of which some miss by chance. A run that stays where it began does not fall
either: the final V stands beside every fall.

370 runs of 20 to 60 s: one to three hours on two cores. Runs that benchmark/results/confounding has with the present
settings are skipped, so that the study can be stopped and continued; the summary says of which commits they are. A run
that fails is named there, too. `--summary` makes no runs, only the table and pictures of those that exist.
"""

import argparse
import csv
import importlib.metadata
import math
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb

import confounding_gridworld as cg
from benchmark.common import RESULTS, ROOT, markdown

FOLDER = RESULTS / "confounding"
SEEDS = range(1, 11)

# One centre and one thing changed at a time, to find what an effect needs: the step (the published one, and a larger
# one), the room in z, the corridor, the coefficients, and the confounding itself. The fresh start gets every step:
# quick trials of it at the two smaller ones had shown no effect. A pilot of the centre (seeds 101 to 103, which the
# study does not use) had 60,000 steps, in which Deep SPI and additive hardly left π_b, so that the study has 120,000.
# α_P weighs a sum over D dimensions: 1.568/D is per dimension what was published for 3136. PPO has no use for
# coefficients, so that its runs at the centre serve for three settings: 11 x 30 + 2 x 20 = 370 runs. The last setting,
# in which nothing makes φ merge states, was added when 100 runs of the others had been seen (with 512 dimensions, which
# four of its runs had, they would have taken minutes each).
CENTRE = {
    "start": "confounded",
    "n_path": 5,
    "epsilon": 0.2,
    "learning_rate": 1e-3,
    "clip_coef": 0.2,
    "latent_dim": 1,
    "reward_loss_coef": 0.01,
    "transition_loss_coef": 1.568,
}
PUBLISHED_STEP = {"learning_rate": 2.5e-4, "clip_coef": 0.1}
LARGEST_STEP = {"learning_rate": 2.5e-3, "clip_coef": 0.4}
GRID = {
    "centre": {},
    "published step (lr 2.5e-4, clip 0.1)": PUBLISHED_STEP,
    "largest step (lr 2.5e-3, clip 0.4)": LARGEST_STEP,
    "D = 2": {"latent_dim": 2, "transition_loss_coef": 1.568 / 2},
    "D = 4": {"latent_dim": 4, "transition_loss_coef": 1.568 / 4},
    "D = 8": {"latent_dim": 8, "transition_loss_coef": 1.568 / 8},
    "harder corridor (n 10, ε 0.1)": {"n_path": 10, "epsilon": 0.1},
    "published coefficients (0.01, 0.0005)": {"transition_loss_coef": 0.0005},
    "DeepMDP's coefficients (1, 1)": {"reward_loss_coef": 1.0, "transition_loss_coef": 1.0},
    "fresh start": {"start": "fresh"},
    "fresh start, published step": {"start": "fresh"} | PUBLISHED_STEP,
    "fresh start, largest step": {"start": "fresh"} | LARGEST_STEP,
    "fresh start, D = 64": {"start": "fresh", "latent_dim": 64, "transition_loss_coef": 1.568 / 64},
}
PRIMARY = "largest_drawdown"  # at the centre

# runs.csv has a line per finished run: settings, metrics, provenance. curves.csv has its V(start), thinned.
SETTINGS = [field.name for field in fields(cg.Args) if field.name not in ("num_seeds", "out_dir")]
NUMBERS = ["start_value", *cg.METRICS, "seconds"]
RUN_COLUMNS = [*SETTINGS, *NUMBERS, "versions", "git_commit"]
CURVE_COLUMNS = [*SETTINGS, "steps", "V_start"]
FAILURE_COLUMNS = [*SETTINGS, "why", "git_commit"]
Runs = dict[str, dict[int, dict]]  # runs[method][seed], as in `cg.draw_values`


def run_args(setting: str, method: str, seed: int) -> cg.Args:
    """The run of a setting. PPO's coefficients are 0, so that settings that differ by them alone share its runs."""
    unused = {"reward_loss_coef": 0.0, "transition_loss_coef": 0.0} if method == "ppo" else {}
    return cg.Args(seed=seed, method=method, **CENTRE | GRID[setting] | unused)


def run_key(run: dict) -> tuple[str, ...]:
    """What tells a run from all others: its settings, as CSV text."""
    return tuple(str(run[name]) for name in SETTINGS)


def plan() -> dict[tuple[str, ...], tuple[str, cg.Args]]:
    """Every run once, with a name to print, seed by seed: an unfinished study has all settings with as many seeds."""
    runs = {}
    for seed in SEEDS:
        for setting in GRID:
            for method in cg.METHODS:
                args = run_args(setting, method, seed)
                runs.setdefault(run_key(vars(args)), (f"{setting}, {cg.METHODS[method]}, seed {seed}", args))
    return runs


def refuse(problem: str) -> None:
    """One line on stderr, and exit code 2."""
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


# ==== Tables ====


def provenance() -> dict[str, str]:
    """Versions and commit, "<commit>-dirty" if the working tree has changes."""
    git = f"git -C {shlex.quote(str(ROOT))} describe --always --abbrev=40 --exclude '*' --dirty"
    status, commit = subprocess.getstatusoutput(git)
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    text = " ".join(f"{name}={version}" for name, version in versions.items())
    return {"versions": text, "git_commit": commit if status == 0 else ""}


def append_row(path: Path, columns: list[str], row: dict) -> None:
    """Add a line to a CSV file; the header too, if the file is new."""
    is_new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def settings_of(args: cg.Args) -> dict:
    """The settings that tell a run from others, as a table has them."""
    return {name: getattr(args, name) for name in SETTINGS}


def save_run(args: cg.Args, metrics: dict[str, float], V: np.ndarray, versions: dict[str, str]) -> None:
    """Append a finished run to the tables; its curve first, so that an interrupted run is not taken for finished."""
    settings = settings_of(args)
    V_start = V[:, cg.make_gridworld(args.n_path, args.epsilon, args.gamma).start]
    kept = np.linspace(0, len(V) - 1, min(len(V), 100)).round().astype(int)
    steps = " ".join(str(n * args.num_envs * args.num_steps) for n in kept)
    curve = {"steps": steps, "V_start": " ".join(f"{V_start[n]:.4f}" for n in kept)}
    append_row(FOLDER / "curves.csv", CURVE_COLUMNS, settings | curve)
    numbers = {name: f"{metrics[name]:.6g}" for name in NUMBERS}
    append_row(FOLDER / "runs.csv", RUN_COLUMNS, settings | numbers | versions)


def rows_by_run(path: Path, columns: list[str]) -> dict[tuple[str, ...], dict]:
    """The rows of a CSV file by their run, none if there is no file. Raises SystemExit(2) if it is damaged."""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != columns:
        refuse(f"{path} must have the columns {','.join(columns)}: move it away")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            refuse(f"{path} must be whole, but row {line} is not: delete that line")
    return {run_key(row): row for row in rows}


def read_runs() -> dict[tuple[str, ...], dict]:
    """The finished runs, with metrics as numbers and the curve as arrays `steps` and `V_start`."""
    runs, curves = rows_by_run(FOLDER / "runs.csv", RUN_COLUMNS), rows_by_run(FOLDER / "curves.csv", CURVE_COLUMNS)
    for key, run in runs.items():
        name = " ".join(key)
        if key not in curves:
            refuse(f"{FOLDER / 'curves.csv'} must have every run of runs.csv, but lacks {name}")
        try:
            run.update({number: float(run[number]) for number in NUMBERS})
            run.update({column: np.array(curves[key][column].split(), float) for column in ("steps", "V_start")})
            iteration = int(run["num_envs"]) * int(run["num_steps"])
            whole = run["steps"][-1] == int(run["total_timesteps"]) // iteration * iteration
        except (ValueError, IndexError) as error:
            refuse(f"the tables in {FOLDER} must hold numbers, but of {name}: {error}")
        if not whole or len(run["steps"]) != len(run["V_start"]):
            refuse(f"a curve in {FOLDER / 'curves.csv'} is short: {name}")
    return runs


# ==== Runs ====


def train_or_fail(args: cg.Args) -> tuple[dict[str, float], cg.History] | cg.RunFailed:
    """What `train` gives, or why it gave nothing: one run that fails does not end the others."""
    try:
        return cg.train(args)
    except cg.RunFailed as error:
        return error


def results(runs: list[tuple[str, cg.Args]], workers: int) -> Iterator[tuple]:
    """Each run's name, arguments and result, as they come: here, or in `workers` processes of one torch thread each."""
    torch.set_num_threads(1)
    if workers == 1:
        yield from ((name, args, train_or_fail(args)) for name, args in runs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(train_or_fail, args): (name, args) for name, args in runs}
        try:
            for future in as_completed(futures):
                yield *futures[future], future.result()
        finally:  # after Ctrl-C the pool would go on with what is left
            pool.shutdown(wait=False, cancel_futures=True)


def make_runs(workers: int) -> int:
    """Make the runs that the tables lack, and return how many failed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    planned, finished, versions = plan(), read_runs(), provenance()
    missing = [run for key, run in planned.items() if key not in finished]
    print(f"{len(planned)} runs, {len(planned) - len(missing)} of them in {FOLDER / 'runs.csv'} already", flush=True)
    failed = 0
    for number, (name, args, result) in enumerate(results(missing, workers), start=1):
        if isinstance(result, cg.RunFailed):
            failed += 1
            print(f"error: {name}: {result}", file=sys.stderr, flush=True)
            row = settings_of(args) | {"why": str(result), "git_commit": versions["git_commit"]}
            append_row(FOLDER / "failures.csv", FAILURE_COLUMNS, row)
        else:
            metrics, history = result
            save_run(args, metrics, history.V, versions)
            numbers = f"largest drawdown {metrics['largest_drawdown']:.2f}, final V {metrics['final_value']:.2f}"
            print(f"[{number}/{len(missing)}] {name}: {numbers}, {metrics['seconds']:.0f} s", flush=True)
    return failed


# ==== Summary ====


def by_setting(finished: dict[tuple[str, ...], dict]) -> dict[str, Runs]:
    """The study's finished runs: by setting, then method, then seed. PPO's may stand in several settings."""
    groups = {}
    for setting in GRID:
        for method in cg.METHODS:
            keys = {seed: run_key(vars(run_args(setting, method, seed))) for seed in SEEDS}
            runs = {seed: finished[key] for seed, key in keys.items() if key in finished}
            if runs:
                groups.setdefault(setting, {})[method] = runs
    return groups


def differences(runs: Runs, other: str, metrics: list[str], method: str = "deep_spi") -> np.ndarray:
    """A method's metrics less those of another, paired by seed: (seeds that both have, metrics)."""
    seeds = sorted(runs.get(method, {}).keys() & runs.get(other, {}).keys())
    pairs = [[runs[method][seed][m] - runs[other][seed][m] for m in metrics] for seed in seeds]
    return np.array(pairs).reshape(-1, len(metrics))


def failures() -> list[str]:
    """A line for every run of the study that failed and has not been made since."""
    failed, finished, planned = rows_by_run(FOLDER / "failures.csv", FAILURE_COLUMNS), read_runs(), plan()
    return [f"{planned[k][0]}: {row['why']}" for k, row in failed.items() if k in planned and k not in finished]


def origin(done: list[dict]) -> str:
    """How many runs, of which commits."""
    commits = Counter(run["git_commit"] for run in done)
    return ", ".join(f"{number} runs of commit {commit or 'unknown'}" for commit, number in commits.items())


def summary(groups: dict[str, Runs]) -> str:
    """Markdown: the primary outcome, then mean and interval of every metric and paired difference in every setting."""
    lines = [f"Primary outcome: {cg.METRICS[PRIMARY]} of V(start) at the centre, paired by seed, mean [95 % interval]."]
    for other in ("additive", "ppo"):
        paired = differences(groups.get("centre", {}), other, [PRIMARY])
        if len(paired):
            cells = cg.summary_row(f"Deep SPI − {cg.METHODS[other]}", paired).strip("|\n ").split(" | ")
            lines.append(f"- {cells[0]}: {cells[2]}, {cells[1]} seeds")
    lines += ["", "All other intervals are exploratory.", ""]
    lines.append(f"| setting | method | runs | {' | '.join(cg.METRICS.values())} |")
    lines.append("|---|---|--:|" + "---|" * len(cg.METRICS))
    for setting, runs in groups.items():
        tables = {cg.METHODS[m]: np.array([[run[k] for k in cg.METRICS] for run in runs[m].values()]) for m in runs}
        for other in ("additive", "ppo"):
            tables[f"Deep SPI − {cg.METHODS[other]}"] = differences(runs, other, list(cg.METRICS))
        rows = [cg.summary_row(name, table).strip() for name, table in tables.items() if len(table)]
        lines += [f"| {setting} {row}" for row in rows]
    return re.sub(r"-(0\.0+)(?!\d)", r"\1", "\n".join(lines) + "\n")  # no -0.00


def drawdown_table(groups: dict[str, Runs]) -> str:
    """Markdown: largest drawdown with its interval and final V, by setting; paired differences, also of the final V."""
    header = ["setting", "seeds", *(cg.METHODS[m] for m in cg.METHODS), "Deep SPI − additive", "Deep SPI − PPO"]
    header += ["additive − PPO", "final V, Deep SPI − PPO"]
    rows = []
    for setting, runs in groups.items():
        falls = [
            f"{cell(np.array([run[PRIMARY] for run in runs[m].values()]))}; V {final_value(runs[m]):.2f}"
            if m in runs
            else "no run yet"
            for m in cg.METHODS
        ]
        paired = [differences(runs, other, [PRIMARY])[:, 0] for other in ("additive", "ppo")]
        seeds = str(min(len(runs.get(m, {})) for m in cg.METHODS))
        compared = [f"{cell(x)}, less in {(x < 0).sum()} of {len(x)}" if len(x) else "" for x in paired]
        others = (differences(runs, "ppo", *of)[:, 0] for of in (([PRIMARY], "additive"), (["final_value"],)))
        rows.append([setting, seeds, *falls, *compared, *(cell(x) if len(x) else "" for x in others)])
    return markdown(header, rows)


def final_value(runs: dict[int, dict]) -> float:
    """Mean final V(start) of one method's runs."""
    return float(np.mean([run["final_value"] for run in runs.values()]))


def cell(x: np.ndarray) -> str:
    """Mean of x (runs,) with its 95 % interval."""
    low, high = cg.mean_interval(x)
    return f"{x.mean():z.2f}" + (f" [{low:z.2f}, {high:z.2f}]" if len(x) > 1 else "")


def draw_values(groups: dict[str, Runs], path: Path) -> None:
    """V(start) over steps, a panel per setting."""
    columns = min(len(groups), 4)
    rows = math.ceil(len(groups) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(9, 5 * columns), 4.4 * rows), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (setting, runs) in zip(axes.flat, groups.items(), strict=False):
        cg.draw_values(axis, runs)
        axis.set_title(setting, fontsize=11)
    cg.save(figure, path)


def tones(colour: str) -> tuple[np.ndarray, np.ndarray]:
    """A pale and a dark tone (3,) of a colour: mixed with white, with black."""
    rgb = np.array(to_rgb(colour))
    return 0.45 * rgb + 0.55, 0.65 * rgb


def draw_falls(groups: dict[str, Runs], path: Path) -> None:
    """Total decrease and largest drawdown of every run (pale dots), with each method's mean and interval (dark)."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 2 + 0.75 * len(groups)), sharey=True)
    for axis, metric in zip(axes, ("total_decrease", "largest_drawdown"), strict=True):
        for row, runs in enumerate(groups.values()):
            for method, shift in zip(cg.METHODS, (-0.25, 0, 0.25), strict=True):
                if method in runs:
                    x = np.array([run[metric] for run in runs[method].values()])
                    pale, dark = tones(cg.COLOURS[method])
                    axis.plot(x, np.full(len(x), row + shift), "o", color=pale, ms=8, mec="white", mew=0.5)
                    axis.plot(cg.mean_interval(x), [row + shift] * 2, "|-", color=dark, lw=1.8, ms=9, mew=1.8)
                    axis.plot(x.mean(), row + shift, "D", color=dark, ms=5)
        axis.set(xlabel=f"{cg.METRICS[metric]} of V(start)", yticks=range(len(groups)), yticklabels=groups)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    for method, name in cg.METHODS.items():
        pale, dark = tones(cg.COLOURS[method])
        axes[1].plot([], [], "o", color=pale, ms=8, label=f"{name}: each run")
        axes[1].plot([], [], "D-", color=dark, lw=1.8, ms=5, label=f"{name}: mean, 95 % interval")
    axes[1].legend(loc="best", fontsize=9)
    cg.save(figure, path)


def draw_pictures(groups: dict[str, Runs]) -> None:
    """The map, the values and the falls, into the folder of the results."""
    cg.draw_gridworld(cg.make_gridworld(CENTRE["n_path"], CENTRE["epsilon"], cg.Args.gamma), FOLDER / "gridworld.png")
    draw_values(groups, FOLDER / "values.png")
    draw_falls(groups, FOLDER / "falls.png")


def summarize() -> None:
    """Pictures and table of all finished runs."""
    finished = read_runs()
    groups = by_setting(finished)
    if not groups:
        refuse(f"{FOLDER / 'runs.csv'} must have at least one run of the study")
    draw_pictures(groups)
    done = [finished[key] for key in plan() if key in finished]
    text = summary(groups) + f"\n{origin(done)}. Failed runs: {'; '.join(failures()) or 'none'}.\n"
    (FOLDER / "summary.md").write_text(text, encoding="utf-8")
    hours = sum(run["seconds"] for run in done) / 3600
    print(f"\n{text}\n{len(done)} of {len(plan())} runs; they took {hours:.1f} hours in all")


def main(arguments: list[str] | None = None) -> None:
    """The runs that are missing, then the summary."""
    whole = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmark.confounding", description=__doc__, formatter_class=whole)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--workers", type=int, help="runs side by side, one thread each (default: one per core)")
    either.add_argument("--summary", action="store_true", help="no runs: table and pictures of those that exist")
    given = parser.parse_args(arguments)
    workers = os.cpu_count() if given.workers is None else given.workers
    if workers < 1:
        refuse(f"--workers: got {workers}; must be at least 1")
    try:
        failed = 0 if given.summary else make_runs(workers)
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, and the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    summarize()
    if failed:
        print(f"error: {failed} runs failed and are not in the tables", file=sys.stderr)
        raise SystemExit(1)
