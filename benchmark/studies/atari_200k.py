"""The first 200,000 steps of three games (`make atari-200k`, then `python -m benchmark.collect`): how the losses go."""

from collections import defaultdict

from benchmark.common import RESULTS, markdown, read_table


def table() -> str:
    """Per script and game: how the metrics went from the first tenth of the run to the last."""
    values = defaultdict(list)  # in step order
    for row in read_table(RESULTS / "atari_200k_metrics.csv"):
        values[row["env_id"], row["script"], row["metric"]].append(float(row["value"]))
    columns = {
        "ℓ_R": "world_model/reward_loss",
        "ℓ_P": "world_model/transition_loss",
        "explained variance": "losses/explained_variance",
        "entropy": "losses/entropy",
        "outside N^C": "spi/outside_neighbourhood",
    }
    rows = []
    for run in read_table(RESULTS / "atari_200k.csv"):
        cells = []
        for metric in columns.values():
            series = values[run["env_id"], run["script"], metric]
            cells.append(f"{series[0]:.3g} → {series[-1]:.3g}" if series else "")
        counted = min(int(run["episodes"]), 100)
        mean_return = f"{run['mean_return_last_100']} ({counted} games)" if counted else "no game ended"
        rows.append([run["env_id"], f"`{run['script']}`", f"{int(run['steps']):,}", run["sps"], mean_return, *cells])
    return markdown(["game", "script", "steps", "SPS", "return, last games", *columns], rows)
