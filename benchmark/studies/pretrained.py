"""The trained agents in pretrained/: python -m benchmark.studies.pretrained

Deep SPI on the three control tasks of suite `control`, seed 1, one torch thread on the CPU: some ten minutes of
training, into runs/pretrained; runs that are complete there are not made again. Each final policy plays GAMES new
games, greedy and sampled. Kept of a run: config.json without the machine's paths, agent.pt, episodes.csv, but not the
script's copy, as the script lies beside evaluate.py; of all runs together pretrained/scores.csv, a row per game.
`evaluate.py --video` films the GIF.
"""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np

from benchmark.common import RESULTS, ROOT, markdown, mean_interval, read_table
from benchmark.suites import CONTROL_STEPS, SOLVED_AT

FOLDER = ROOT / "pretrained"
SCORES = FOLDER / "scores.csv"
GAMES = 100
FILMED = "LunarLander-v3"


def make(env_id: str, steps: int) -> list[dict[str, str]]:
    """Train where that is not done yet, play, and keep the run; the rows of its games. Raises CalledProcessError."""
    run_dir, kept = ROOT / "runs" / "pretrained" / env_id, FOLDER / env_id
    settings = ["--env-id", env_id, "--total-timesteps", str(steps), "--seed", "1", "--device", "cpu"]
    train = [sys.executable, "deep_spi_ppo.py", *settings, "--run-dir", str(run_dir)]
    play = [sys.executable, "evaluate.py", str(run_dir), "--episodes", str(GAMES)]
    for command in (train, [*play, "--video"] if env_id == FILMED else play):
        subprocess.run(command, cwd=ROOT, check=True)
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("script_path")
    config["args"]["run_dir"] = ""
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("agent.pt", "episodes.csv"):
        shutil.copyfile(run_dir / name, kept / name)
    if env_id == FILMED:
        shutil.copyfile(run_dir / "greedy.gif", RESULTS / "lunar_lander.gif")
    return [{"env_id": env_id} | row for row in read_table(run_dir / "evaluation.csv")]


def returns(env_id: str, policy: str) -> np.ndarray:
    """Return of each game (GAMES,) that scores.csv states of an agent's policy."""
    rows = read_table(SCORES)
    return np.array([float(row["return"]) for row in rows if (row["env_id"], row["policy"]) == (env_id, policy)])


def table() -> str:
    """Markdown: mean return over the games with its 95 % interval, by task and policy."""
    rows = []
    for env_id in CONTROL_STEPS:
        cells = []
        for policy in ("sampled", "greedy"):
            own = returns(env_id, policy)
            low, high = mean_interval(own)
            cells.append(f"{own.mean():.1f} [{low:.1f}, {high:.1f}]")
        rows.append([f"`pretrained/{env_id}`", f"{CONTROL_STEPS[env_id]:,}", *cells, f"{SOLVED_AT[env_id]:g}"])
    return markdown(["agent", "steps", f"return, {GAMES} new games, sampled", "greedy", "solved at"], rows)


def main() -> None:
    """All of it."""
    rows = [row for env_id, steps in CONTROL_STEPS.items() for row in make(env_id, steps)]
    with open(SCORES, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table())


if __name__ == "__main__":
    main()
