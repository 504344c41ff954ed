"""The control study: python -m benchmark.control

`deep_spi_ppo.py` with its defaults on CartPole-v1, Acrobot-v1 and LunarLander-v3, seeds 1 to 10, with nothing but the
number of steps set. Protocol, fixed before the runs: a run solves its task if the mean return of its last 100 episodes
reaches the threshold. One change was made on the way: LunarLander-v3 had 1 M steps at first, at which seeds 1, 2, 9 and
10 gave 258, 260, 184 and 252; all ten then got 1.5 M, before any of the other six had been run.

Runs that benchmark/results/control.csv has with the present settings are skipped, so that the study can be stopped and
continued; an unfinished run, or one of other settings, is moved aside, as <name>.broken-<time>, and begun again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deep_spi_ppo
from benchmark.collect import collect, is_finished, read_table, settings_text
from benchmark.suites import CONTROL_STEPS

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "control"
RESULTS = ROOT / "benchmark" / "results" / "control"
THRESHOLDS = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "LunarLander-v3": 200.0}
SEEDS = range(1, 11)


def settings(env_id: str) -> str:
    """Today's settings of the task's runs, as the table has them."""
    return settings_text(vars(deep_spi_ppo.Args(total_timesteps=CONTROL_STEPS[env_id])))


def results(env_id: str) -> list[dict[str, str]]:
    """The committed table's rows of the task made with today's settings."""
    rows = read_table(RESULTS.with_suffix(".csv"))
    return [row for row in rows if row["env_id"] == env_id and row["settings"] == settings(env_id)]


def has_run(env_id: str, seed: int, run_dir: Path) -> bool:
    """Whether the run is in the committed table, or finished in its folder, made with today's settings."""
    if any(row["seed"] == str(seed) for row in results(env_id)):
        return True
    if not run_dir.exists() or not is_finished(run_dir):
        return False
    return settings_text(json.loads((run_dir / "config.json").read_text())["args"]) == settings(env_id)


def run(env_id: str, seed: int) -> None:
    """One run in a process of its own, on one core. Raises CalledProcessError if it fails."""
    run_dir = RUNS / f"{env_id}__{seed}"
    if has_run(env_id, seed, run_dir):
        return
    if run_dir.exists():
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.broken-{int(time.time())}"))
    flags = [f"--env-id={env_id}", f"--seed={seed}", f"--total-timesteps={CONTROL_STEPS[env_id]}"]
    folder = [f"--runs-dir={RUNS}", f"--run-name={run_dir.name}"]
    command = [sys.executable, str(ROOT / "deep_spi_ppo.py"), *flags, *folder]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(f"{env_id} seed {seed}: {done.stdout.splitlines()[0] if done.stdout else done.stderr}", flush=True)
    done.check_returncode()


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.control", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (default: one per core)")
    with ThreadPoolExecutor(parser.parse_args().workers) as pool:
        futures = [pool.submit(run, env_id, seed) for env_id in CONTROL_STEPS for seed in SEEDS]
    print(f"{collect(RUNS, RESULTS)} runs made; results in {RESULTS.relative_to(ROOT)}*.csv")
    for future in futures:  # a failed run makes the study fail, after the others have been kept
        future.result()


if __name__ == "__main__":
    main()
