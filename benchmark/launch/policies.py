"""A run's policies on the way: kept at tenths of the run, and played when it is finished.

While a script runs, its worker looks at each new checkpoint, and keeps the weights of those at the steps that
`kept_steps` names: RUN_DIR/policies/STEP.pt. So that there are checkpoints at these steps, the worker sets the script's
--checkpoint-interval. `python -m benchmark.launch.policies RUN_DIR --episodes N` lets each play N new games, and adds
them to RUN_DIR/policies.csv: what evaluation.csv has of the final policy, with the policy's step before it. It goes on
where it was stopped.
"""

import argparse
import csv
import os
from collections import Counter
from pathlib import Path

from benchmark.common import read_table

PARTS = 10
SHARE = 4  # of the final policy's games, one in so many for each policy on the way
HEADER = ("global_step", "policy", "return", "length", "ended")


def checkpoint_interval(settings: dict) -> int:
    """Iterations from one checkpoint to the next, by which every tenth of the run is hit to 1 % of the run."""
    return max(1, min(100, iterations_of(settings) // (5 * PARTS)))


def iterations_of(settings: dict) -> int:
    """Iterations of the complete run."""
    return settings["total_timesteps"] // rollout_of(settings)


def rollout_of(settings: dict) -> int:
    """Steps of an iteration."""
    return settings.get("num_envs", 1) * settings.get("num_steps", 1)


def kept_steps(settings: dict) -> set[int]:
    """Steps whose policies are kept, nine if the run is not too short: the end of the run has agent.pt."""
    iterations, interval = iterations_of(settings), checkpoint_interval(settings)
    kept = {interval * round(part * iterations / PARTS / interval) for part in range(1, PARTS)}
    return {each * rollout_of(settings) for each in kept if 0 < each < iterations}


def games_on_the_way(games: int) -> int:
    """How many games a policy on the way plays where the final one plays `games`."""
    return -(-games // SHARE)


def keep(run_dir: Path, step: int, weights: dict) -> None:
    """Write the policy's weights, whole or not at all."""
    import torch  # here, as it takes seconds, in which the script starts

    folder = run_dir / "policies"
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{step}.tmp"
    torch.save(weights, temporary)
    os.replace(temporary, folder / f"{step}.pt")


class Keeper:
    """Keeps what passes as checkpoint.pt at one of the steps."""

    def __init__(self, run_dir: Path, settings: dict):
        self.run_dir, self.rollout, self.steps, self.seen = run_dir, rollout_of(settings), kept_steps(settings), None

    def look(self) -> None:
        """Keep the weights of the present checkpoint if it is new and due. Not those of a script with another form."""
        import torch

        path = self.run_dir / "checkpoint.pt"
        try:
            found = path.stat()
        except FileNotFoundError:
            return
        if (found.st_ino, found.st_mtime_ns) == self.seen:
            return
        self.seen = found.st_ino, found.st_mtime_ns
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            step, weights = state["iterations"] * self.rollout, state["agent"]
        except Exception:  # of many kinds, as it may be any file
            return
        if step in self.steps:
            keep(self.run_dir, step, weights)


def unplayed(run_dir: Path, games: int) -> list[int]:
    """Steps whose policies have been kept and have not played so many games, in order."""
    rows = read_table(run_dir / "policies.csv")
    played = Counter(int(row["global_step"]) for row in rows if row["policy"] == "sampled")
    kept = sorted(int(path.stem) for path in run_dir.glob("policies/*.pt"))
    return [step for step in kept if played[step] < games]


def play(run_dir: Path, games: int) -> None:
    """Let them play, as evaluate.py does with the final policy. Raises SystemExit(2) as it does."""
    import torch

    import evaluate

    own = evaluate.Args(run_dir, episodes=games)
    config = evaluate.load_config(run_dir)
    script = evaluate.script_of(run_dir, config, None)
    args = evaluate.settings_of(script, config, own.seed, games)
    path = run_dir / "policies.csv"
    for step in unplayed(run_dir, games):
        weights = torch.load(run_dir / "policies" / f"{step}.pt", map_location="cpu", weights_only=True)
        torch.manual_seed(own.seed)
        environments = script.Games(args)
        agent = evaluate.make_agent(script, args, environments, weights)
        torch.manual_seed(own.seed)  # again, as the agent has drawn its first weights
        played = evaluate.play(agent, environments, args, False, own.max_length, None)
        others = [tuple(row.values()) for row in read_table(path) if int(row["global_step"]) != step]
        rows = others + [(step, "sampled", *episode) for episode in played]
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER, *sorted(rows, key=lambda row: int(row[0]))])
        os.replace(temporary, path)
        print(f"{path}: {games} games of the policy of step {step:,}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmark.launch.policies", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--episodes", type=int, default=16)
    arguments = parser.parse_args()
    play(arguments.run_dir, arguments.episodes)
