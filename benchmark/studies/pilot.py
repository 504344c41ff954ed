"""Suite `pilot`: which games are learned early. Its protocol stands beside `PILOT_GAMES` in benchmark/suites.py."""

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
