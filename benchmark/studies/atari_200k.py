"""The first 200,000 steps of three games (`make atari-200k`, then `python -m benchmark.collect`): how the losses go."""

from collections import defaultdict

from benchmark.common import RESULTS, markdown, read_table

LATENT_SIZE = 7 * 7 * 64
SUMS = ("deep_spi_ppo_atari.py",)  # scripts whose ℓ_P is a sum over the latent; DeepMDP's is a mean


def table() -> str:
    """Per script and game: how the metrics went from the first tenth to the last; ℓ_P per dimension of the latent."""
    values = defaultdict(list)  # in step order
    for row in read_table(RESULTS / "atari_200k_metrics.csv"):
        values[row["env_id"], row["script"], row["metric"]].append(float(row["value"]))
    columns = {
        "ℓ_R": "world_model/reward_loss",
        "ℓ_P per dimension": "world_model/transition_loss",
        "explained variance": "losses/explained_variance",
        "entropy": "losses/entropy",
        "outside N^C": "spi/outside_neighbourhood",
    }
    rows = []
    for run in read_table(RESULTS / "atari_200k.csv"):
        cells = []
        for metric in columns.values():
            sums = metric == columns["ℓ_P per dimension"] and run["script"] in SUMS
            series = [value / (LATENT_SIZE if sums else 1) for value in values[run["env_id"], run["script"], metric]]
            cells.append(f"{series[0]:.3g} → {series[-1]:.3g}" if series else "")
        counted = min(int(run["episodes"]), 100)
        mean_return = f"{run['mean_return_last_100']} ({counted} games)" if counted else "no game ended"
        rows.append([run["env_id"], f"`{run['script']}`", f"{int(run['steps']):,}", run["sps"], mean_return, *cells])
    return markdown(["game", "script", "steps", "SPS", "return, last games", *columns], rows)
