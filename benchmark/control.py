"""The control study: python -m benchmark.control

`deep_spi_ppo.py` with its defaults on CartPole-v1, Acrobot-v1 and LunarLander-v3, seeds 1 to 10, with nothing but the
number of steps set. Protocol, fixed before the runs: a run solves its task if the mean return of its last 100 episodes
reaches the threshold. Finished runs are skipped, so that the study can be stopped and continued; an unfinished one is
moved aside, as <name>.broken-<time>, and begun again. Results go to benchmark/results/control*.csv.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmark.collect import collect, is_finished

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "control"
TASKS = {"CartPole-v1": 200_000, "Acrobot-v1": 200_000, "LunarLander-v3": 1_000_000}  # steps
THRESHOLDS = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "LunarLander-v3": 200.0}
SEEDS = range(1, 11)


def run(env_id: str, seed: int) -> None:
    """One run in a process of its own, on one core. Raises CalledProcessError if it fails."""
    run_dir = RUNS / f"{env_id}__{seed}"
    if is_finished(run_dir):
        return
    if run_dir.exists():
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.broken-{int(time.time())}"))
    flags = [f"--env-id={env_id}", f"--seed={seed}", f"--total-timesteps={TASKS[env_id]}"]
    folder = [f"--runs-dir={RUNS}", f"--run-name={run_dir.name}"]
    command = [sys.executable, str(ROOT / "deep_spi_ppo.py"), *flags, *folder]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(f"{env_id} seed {seed}: {done.stdout.splitlines()[0] if done.stdout else done.stderr}", flush=True)
    done.check_returncode()


if __name__ == "__main__":
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(run, env_id, seed) for seed in SEEDS for env_id in TASKS]
    for future in futures:
        future.result()
    print(
        f"{collect(RUNS, ROOT / 'benchmark' / 'results' / 'control')} finished runs in benchmark/results/control*.csv"
    )
