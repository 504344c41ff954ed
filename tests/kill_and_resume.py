"""Kill -9 a training script at random instants and go on with it: python -m tests.kill_and_resume [--kills 100]

The kills are spread over the training scripts, small settings, checkpoints often; each instant is drawn from the length
of a run, from the start of Python on. The same command starts a run and goes on with it. When a run ends, everything
that it left is checked, and the next one begins.
"""

import argparse
import csv
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SMALL = {
    "deep_spi_ppo": "--num-envs 8 --num-steps 64 --total-timesteps 25600 --update-epochs 2",
    "deep_spi_ppo_atari": "--num-envs 4 --num-steps 8 --total-timesteps 640 --update-epochs 1 --env-id Boxing-v5",
    "deepmdp_ppo_atari": "--num-envs 4 --num-steps 8 --total-timesteps 640 --update-epochs 1 --env-id Boxing-v5",
    "ppo_baseline": "--num-envs 4 --num-steps 128 --total-timesteps 10240 --update-epochs 1 --env-id SpaceInvaders-v5",
    "spr_ppo_atari": "--num-envs 4 --num-steps 8 --total-timesteps 640 --update-epochs 1 --env-id Boxing-v5",
    "dbc_ppo_atari": "--num-envs 4 --num-steps 8 --total-timesteps 640 --update-epochs 1 --env-id Boxing-v5",
    "deep_spi_ppo_continuous": "--num-envs 8 --num-steps 64 --total-timesteps 15360 --env-id Hopper-v4",
    "dream_spi": "--num-envs 8 --num-steps 16 --total-timesteps 5120 --update-epochs 1 --horizon 3",
    "dream_spi_atari": "--num-envs 4 --num-steps 8 --total-timesteps 320 --horizon 2 --env-id Boxing-v5",
}
SECONDS = 14.0  # a run and its start, about


def check_run(run_dir: Path) -> None:
    """Raises AssertionError unless the finished run is one unbroken whole."""
    config = json.loads((run_dir / "config.json").read_text())
    args = config["args"]
    rollout = args["num_envs"] * args["num_steps"]
    expected = np.arange(rollout, args["total_timesteps"] + 1, rollout)
    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    accumulator.Reload()
    events = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    told = [events.pop(f"charts/episodic_{what}", []) for what in ("return", "length")]
    assert events.keys() >= {"charts/SPS", "losses/policy_loss", "spi/ratio_max"}
    for tag, points in events.items():  # every iteration logged once, none missing
        np.testing.assert_array_equal([point.step for point in points], expected, err_msg=tag)
        assert np.isfinite([point.value for point in points]).all(), tag
    with open(run_dir / "episodes.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["global_step", "return", "length"]
    steps = np.array([int(row[0]) for row in rows])
    assert (np.diff(steps) >= 0).all() and (steps % args["num_envs"] == 0).all()
    assert len(steps) == 0 or (steps[0] > 0 and steps[-1] <= expected[-1])
    # No environment makes more steps in its episodes than it was stepped.
    assert sum(int(row[2]) for row in rows) <= expected[-1]
    # TensorBoard was told the same episodes.
    for column, points in enumerate(told, start=1):
        assert [point.step for point in points] == steps.tolist()
        np.testing.assert_allclose([point.value for point in points], [float(row[column]) for row in rows], rtol=1e-5)
    at_once = np.unique(steps, return_counts=True)[1]
    assert len(at_once) == 0 or at_once.max() <= args["num_envs"]
    # The weights are there twice, and the code once.
    weights = torch.load(run_dir / "agent.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["iterations"] == len(expected) and state["config"] == config
    assert state["episodes_bytes"] == (run_dir / "episodes.csv").stat().st_size
    assert weights.keys() == state["agent"].keys()
    assert all(torch.equal(weights[name], state["agent"][name]) for name in weights)
    assert (run_dir / config["script"]).read_bytes() == Path(config["script_path"]).read_bytes()
    resumes = config["resumes"]
    assert resumes == sorted(resumes) and set(resumes) <= set(expected.tolist())
    assert not list(run_dir.glob("*.tmp"))


def kill_and_resume(script: str, kills: int, folder: Path, seed: int, seconds: float = SECONDS) -> int:
    """Kill the script so many times, going on after each; the number of runs. Raises AssertionError on any loss."""
    rng, killed, number = random.Random(seed), 0, 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    while killed < kills:
        number += 1
        run_dir = folder / f"{script}-{number}"
        command = [sys.executable, str(ROOT / f"{script}.py"), *SMALL[script].split(), "--checkpoint-interval", "3"]
        command += ["--device", "cpu", "--seed", str(number), "--run-dir", str(run_dir)]
        while True:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            if killed < kills:
                wait_until = time.monotonic() + rng.uniform(0, seconds)
                while process.poll() is None and time.monotonic() < wait_until:
                    time.sleep(0.01)
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    killed += 1
                    continue
            _, error = process.communicate()
            assert process.returncode == 0, error
            check_run(run_dir)
            break
    return number


def main() -> None:
    """Spread the kills over the scripts, and say how it went."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill_and_resume", description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=list(SMALL), metavar="SCRIPT", help=", ".join(SMALL))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what a run and its start take, about")
    arguments = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns where it drops what a kill left behind
    count = len(arguments.scripts)
    with tempfile.TemporaryDirectory() as folder:
        for i, script in enumerate(arguments.scripts):
            kills = arguments.kills // count + (i < arguments.kills % count)
            runs = kill_and_resume(script, kills, Path(folder), arguments.seed, arguments.seconds)
            print(f"{script}.py: {kills} kills; {runs} runs finished, each one unbroken whole", flush=True)


if __name__ == "__main__":
    main()
