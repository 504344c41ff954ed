"""Draw a run's learning curve: python -m benchmark.learning_curve RUN_DIR

Reads RUN_DIR/episodes.csv and writes RUN_DIR/learning_curve.png: each episode's return, and the mean of the last 100.
"""

import json
import sys
from pathlib import Path

import matplotlib

from benchmark.common import read_episodes, running_mean

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(run_dir: Path) -> Path:
    """Write the picture and return its path. Raises SystemExit(2) if no episode has ended."""
    steps, returns, _ = read_episodes(run_dir).T
    if len(steps) == 0:
        print(f"error: {run_dir / 'episodes.csv'}: no episode has ended yet", file=sys.stderr)
        raise SystemExit(2)
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, returns, ".", markersize=2, color="0.75", label="one episode")
    axes.plot(steps, running_mean(returns, 100), color="C0", linewidth=2, label="mean of the last 100 episodes")
    axes.set(xlabel="environment steps", ylabel="return")
    axes.set_title(f"{config['args']['env_id']}, {config['script']}, seed {config['args']['seed']}")
    axes.legend()
    path = run_dir / "learning_curve.png"
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    """The command line. Raises SystemExit(2)."""
    if len(sys.argv) != 2:
        print("usage: python -m benchmark.learning_curve RUN_DIR", file=sys.stderr)
        raise SystemExit(2)
    print(f"learning curve: {draw(Path(sys.argv[1]))}")
