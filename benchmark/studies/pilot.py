"""Suite `pilot`: which games are learned early. Its protocol stands beside `PILOT_GAMES` in benchmark/suites.py."""

import numpy as np
from rliable import metrics

from benchmark.common import RESULTS, markdown, mean_interval
from benchmark.report.runs import read_known_scores, read_results

FOLDER = RESULTS / "suites" / "pilot"


def table() -> str:
    """Per game of suite `pilot`: what the final policy scores, with its 95 % interval over games, best first."""
    rows = {}  # by human-normalised score
    for run in read_results(FOLDER).runs:
        returns, known = run.policies[run.done["steps"]], read_known_scores()[run.game]
        low, high = mean_interval(returns)
        score = float(run.normalised(returns.mean()))
        mean = f"{returns.mean():z,.1f} [{low:z,.1f}, {high:z,.1f}]"
        rows[score] = [run.game, mean, f"{known['random']:,g}", f"{known['human']:,g}", f"{score:z.2f}"]
    header = ["game", "final policy, 64 games", "random player", "human", "human-normalised"]
    return markdown(header, [rows[score] for score in sorted(rows, reverse=True)])


def authors_table() -> str:
    """What the authors' own scores of PPO come to, human-normalised: of all games, and without those that read 0."""
    aggregates = {
        "IQM": metrics.aggregate_iqm,
        "median": metrics.aggregate_median,
        "mean": metrics.aggregate_mean,
        "optimality gap": metrics.aggregate_optimality_gap,
    }
    known = read_known_scores().values()
    rows = []
    for name, games in (("all", known), ("without an exact 0", [game for game in known if game["published_ppo"]])):
        score, zero, one = (np.array([game[key] for game in games]) for key in ("published_ppo", "random", "human"))
        normalised = ((score - zero) / (one - zero))[None]  # rliable: (runs, games)
        rows.append([name, str(len(games)), *(f"{aggregate(normalised):.3f}" for aggregate in aggregates.values())])
    return markdown(["games", "number", *aggregates], rows)
