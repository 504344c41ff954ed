"""How far σ falls short in a real run: python -m benchmark.studies.spectral_norm [--env-id Pong-v5]

`SpectralLayer` does not work out σ anew: it follows it. Here `deep_spi_ppo_atari.py` trains as it is, and before every
40th step of the optimiser the σ that each layer divides by is compared with the largest singular value, by LAPACK in
float64. Written to benchmark/results/spectral_norm.csv, a line per layer and comparison: understated is 1 - σ/σ_true.
"""

import argparse
import csv
import tempfile

import torch

import deep_spi_ppo_atari as script
from benchmark.common import RESULTS

TABLE = RESULTS / "spectral_norm.csv"
EVERY = 40  # steps of the optimiser


def measure(env_id: str, steps: int) -> list[tuple[str, int, float]]:
    """Train for so many global steps: (layer, step of the optimiser, by how much σ is understated) in order."""
    rows, names, counts = [], {}, {}
    init, follow = script.Agent.__init__, script.SpectralLayer.follow

    def named_init(agent, num_actions):
        init(agent, num_actions)
        names.update({id(layer): name for name, layer in agent.named_modules()})

    def checked_follow(layer):
        follow(layer)
        counts[id(layer)] = counts.get(id(layer), 0) + 1
        if counts[id(layer)] % EVERY == 0:
            matrices = layer.matrices().detach()
            sigma = torch.linalg.vector_norm(matrices.mT @ layer.u, dim=(1, 2)).double()
            true = torch.linalg.matrix_norm(matrices.double(), ord=2)
            rows.append((names[id(layer)], counts[id(layer)], (1 - sigma / true).max().item()))

    script.Agent.__init__, script.SpectralLayer.follow = named_init, checked_follow
    try:
        with tempfile.TemporaryDirectory() as folder:
            script.train(script.Args(env_id=env_id, total_timesteps=steps, device="cpu", run_dir=f"{folder}/run"))
    finally:
        script.Agent.__init__, script.SpectralLayer.follow = init, follow
    return rows


def main() -> None:
    """Measure, write the table, and say the largest of each layer."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.spectral_norm", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--env-id", default="Pong-v5")
    parser.add_argument("--steps", type=int, default=200_704)
    arguments = parser.parse_args()
    rows = measure(arguments.env_id, arguments.steps)
    with open(TABLE, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("env_id", "layer", "optimiser_step", "understated"))
        table.writerows((arguments.env_id, name, step, f"{value:.3g}") for name, step, value in rows)
    for layer in dict.fromkeys(name for name, _, _ in rows):
        print(f"{layer}: at most {max(value for name, _, value in rows if name == layer):.1e}")


if __name__ == "__main__":
    main()
