"""Tables and picture of benchmark/results/throughput.csv: python -m benchmark.throughput_figures"""

from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from benchmark.collect import markdown, read_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ITERATION = 1024  # agent steps
STAGES = ("environment", "encoder, 16 updates", "P̄ and ℓ_P", "R̄ and ℓ_R", "rest of the learner")
RATIOS = {  # label: above and below the fraction line, each (case, measure)
    "`ppo_baseline.py` : plain, end to end": (("ppo_baseline A=6", "sps"), ("ppo_baseline plain A=6", "sps")),
    **{
        f"`deep_spi_ppo_atari.py` : plain, end to end, A = {a}": (
            (f"deep_spi_ppo_atari A={a}", "sps"),
            (f"deep_spi_ppo_atari plain A={a}", "sps"),
        )
        for a in (6, 18)
    },
    "`deep_spi_ppo_atari.py` : `ppo_baseline.py` plain, end to end, A = 6": (
        ("deep_spi_ppo_atari A=6", "sps"),
        ("ppo_baseline plain A=6", "sps"),
    ),
    **{
        f"`{script}.py` : `ppo_baseline.py`, end to end, A = {a}": (
            (f"{script} A={a}", "sps"),
            (f"ppo_baseline A={a}", "sps"),
        )
        for script in ("deepmdp_ppo_atari", "deep_spi_ppo_atari")
        for a in (6, 18)
    },
    "Deep SPI learner, A = 18 : A = 4": (
        ("deep_spi_ppo_atari learner A=18", "sps"),
        ("deep_spi_ppo_atari learner A=4", "sps"),
    ),
    **{
        f"time of P̄ and ℓ_P : the encoder's, 256 rows, A = {a}": (
            (f"stages A={a}", "transition_256_rows_s"),
            (f"stages A={a}", "encoder_256_rows_s"),
        )
        for a in (4, 6, 18)
    },
    "`ppo_baseline.py --precision fp32` : Stable-Baselines3's PPO (float32), A = 6": (
        ("ppo_baseline fp32 A=6", "sps"),
        ("stable_baselines3 A=6", "sps"),
    ),
    "`ppo_baseline.py` : Stable-Baselines3's PPO (float32), A = 6": (
        ("ppo_baseline A=6", "sps"),
        ("stable_baselines3 A=6", "sps"),
    ),
}


def throughput_values(results: Path) -> dict[tuple[str, str], list[float]]:
    """(case, measure) → its value in each round, in the order of the rounds."""
    values = defaultdict(list)
    for row in read_table(results / "throughput.csv"):
        values[row["case"], row["measure"]].append(float(row["value"]))
    return values


def ratio_table(results: Path) -> str:
    """Ratios of what one round measured: median over the rounds, smallest and largest. What was left out has no row."""
    values, rows = throughput_values(results), []
    for label, (above, below) in RATIOS.items():
        pairs = zip(values[above], values[below], strict=False)  # a case may have been left out of every round
        ratios = np.array([first / second for first, second in pairs])
        if len(ratios):
            spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
            rows.append([label, f"{np.median(ratios):.2f}", spread, str(len(ratios))])
    return markdown(["ratio", "median", "smallest to largest", "pairs"], rows)


def speed_table(results: Path) -> str:
    """Steps per second, memory and overhead of each case, and the share of the roofline: medians over the rounds."""
    values, rows = throughput_values(results), []
    for case in dict.fromkeys(case for case, measure in values if measure == "sps"):
        sps, memory, overhead = (
            np.median(values[case, measure]) for measure in ("sps", "peak_memory_gb", "overhead_s")
        )
        rows.append([case, f"{sps:.0f}", f"{memory:.2f}", f"{overhead:.1f}", roofline_share(values, case, sps)])
    return markdown(["case", "steps/s", "peak memory, GB", "overhead, s", "of the roofline"], rows)


def roofline_share(values: dict, case: str, sps: float) -> str:
    """Time of an iteration's multiplications at the matrix peak plus the environment's own, over the time it takes."""
    name, _, num_actions = case.partition(" A=")
    algorithm = {"ppo_baseline": "ppo", "deep_spi_ppo_atari": "deep_spi"}.get(name)
    if algorithm is None:
        return ""
    stages = {
        measure: np.median(values[f"stages A={num_actions}", measure])
        for measure in (f"{algorithm}_flops", "matrix_flops_per_s", "environment_sps")
    }
    bound = stages[f"{algorithm}_flops"] / stages["matrix_flops_per_s"] + ITERATION / stages["environment_sps"]
    return f"{100 * bound / (ITERATION / sps):.0f} %"


def throughput_figure(results: Path) -> None:
    """Where an iteration of Deep SPI and of PPO goes, in seconds, for 4, 6 and 18 actions."""
    values = throughput_values(results)
    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    labels = []
    for script, has_model in (("ppo_baseline", False), ("deep_spi_ppo_atari", True)):
        for num_actions in (4, 6, 18):
            stages = f"stages A={num_actions}"
            if not values[f"{script} learner A={num_actions}", "sps"]:
                continue
            learner = ITERATION / np.median(values[f"{script} learner A={num_actions}", "sps"])
            parts = {
                "environment": ITERATION / np.median(values[stages, "environment_sps"]),
                "encoder, 16 updates": 16
                * np.median(values[stages, "encoder_288_frames_s" if has_model else "encoder_256_rows_s"]),
            }
            if has_model:
                parts["P̄ and ℓ_P"] = 16 * np.median(values[stages, "transition_256_rows_s"])
                parts["R̄ and ℓ_R"] = 16 * np.median(values[stages, "reward_256_rows_s"])
            parts["rest of the learner"] = learner - sum(list(parts.values())[1:])
            left = 0.0
            for part, color in zip(STAGES, ("C7", "C0", "C3", "C1", "0.8"), strict=True):
                axis.barh(len(labels), parts.get(part, 0), left=left, color=color, label=None if labels else part)
                left += parts.get(part, 0)
            axis.plot(
                ITERATION / np.median(values[f"{script} A={num_actions}", "sps"]), len(labels), "k|", markersize=14
            )
            labels.append(f"{script}.py, A = {num_actions}")
    axis.set(yticks=range(len(labels)), yticklabels=labels, xlabel="seconds an iteration (1,024 steps); | end to end")
    figure.legend(loc="outside upper center", ncols=len(STAGES), fontsize=8)
    figure.savefig(results / "throughput.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    folder = Path(__file__).parent / "results"
    print(ratio_table(folder), speed_table(folder), sep="\n\n")
    throughput_figure(folder)
