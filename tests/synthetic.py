"""Make up a suite's results, to try the report at full size: python -m tests.synthetic OUT

OUT gets plan.json and ALGORITHM/TASK/SEED/ with config.json, episodes.csv and done.json: what benchmark.report reads,
without weights and TensorBoard events. The numbers mean nothing, and the config files say so. The default size, 57
games, 4 algorithms, 5 seeds and 10 M steps, is 12 million episodes and takes a minute or two.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from benchmark.report.runs import read_known_scores

NUM_ENVS, NUM_STEPS = 128, 8
EPISODE_LENGTHS = (400, 3000)  # agent steps, mean of the shortest and of the longest game


def make_episodes(random: np.random.Generator, steps: int, length: float, low: float, high: float) -> pd.DataFrame:
    """Episodes of about `length` steps that fill the run, their returns noisily rising from `low` towards `high`."""
    lengths = np.maximum(1, random.gamma(4.0, length / 4, size=int(1.2 * steps / length) + 50).astype(np.int64))
    ends = -(-np.cumsum(lengths) // NUM_ENVS) * NUM_ENVS  # all environments step together, so steps come in multiples
    lengths, ends = lengths[ends <= steps], ends[ends <= steps]
    progress = 1 - np.exp(-3 * ends / steps)
    returns = low + (high - low) * (progress + 0.2 * random.normal(size=len(ends)))
    return pd.DataFrame({"global_step": ends, "return": returns.round(1), "length": lengths})


def make_run(run_dir: Path, env_id: str, algorithm: str, seed: int, steps: int, episodes: pd.DataFrame) -> None:
    """Write one finished run. Raises FileExistsError if the folder is there."""
    run_dir.mkdir(parents=True)
    args = {
        "env_id": env_id,
        "seed": seed,
        "total_timesteps": steps,
        "num_envs": NUM_ENVS,
        "num_steps": NUM_STEPS,
    }
    config = {
        "script": f"{algorithm}.py (made up by tests.synthetic)",
        "args": args,
        "device": "none",
        "precision": "made up",
        "torch_threads": 1,
        "git_commit": "0" * 40,
        "machine": "none: made up",
        "versions": {"python": "made up"},
    }
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    episodes.to_csv(run_dir / "episodes.csv", index=False, lineterminator="\n")
    (run_dir / "done.json").write_text(json.dumps({"steps": steps, "minutes": 1.0, "sps": steps / 60}) + "\n")


def make_suite(out: Path, games: int, algorithms: int, seeds: int, steps: int) -> int:
    """Write the whole tree below `out` and return the number of episodes.

    Algorithms are `ppo`, the report's default baseline, and made_up_2, made_up_3, ..., each a little better than the
    one before. Raises ValueError for more games than there are.
    """
    known = read_known_scores()
    if not 1 <= games <= len(known):
        raise ValueError(f"games must be 1 to {len(known)}, not {games}")
    steps = steps // (NUM_ENVS * NUM_STEPS) * NUM_ENVS * NUM_STEPS  # whole rollouts, as the scripts do
    plan, episodes = [], 0
    names = ["ppo", *(f"made_up_{i}" for i in range(2, algorithms + 1))]
    for a, algorithm in enumerate(names):
        for g, (game, scores) in enumerate(list(known.items())[:games]):
            for seed in range(1, seeds + 1):
                random = np.random.default_rng((a, g, seed))
                length = np.geomspace(*EPISODE_LENGTHS, num=len(known))[(7 * g) % len(known)]
                skill = (0.1 + g % 10 / 5) * (1 + 0.2 * a) * random.uniform(0.8, 1.2)  # human-normalised
                high = scores["random"] + skill * (scores["human"] - scores["random"])
                table = make_episodes(random, steps, length, scores["random"], high)
                task = f"{game}-v5"
                make_run(out / algorithm / task / str(seed), task, algorithm, seed, steps, table)
                key = {"algorithm": algorithm, "env_id": task, "label": task, "seed": seed}
                plan.append(key | {"script": f"{algorithm}.py", "flags": {}, "total_timesteps": steps})
                episodes += len(table)
    (out / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    return episodes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.synthetic", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    for flag, default in (("games", 57), ("algorithms", 4), ("seeds", 5), ("steps", 10_000_000)):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default: {default:,}")
    arguments = parser.parse_args()
    try:
        made = make_suite(**vars(arguments))
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(f"{made:,} made-up episodes in {arguments.out}")
