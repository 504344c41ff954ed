"""What happens when V falls: python -m benchmark.studies.confounding_mechanism

Exploratory: thought of when a third of the study's runs (`benchmark.confounding`) had been seen. The study's runs at
the centre are made again, as they come out the same every time, and looked at after every iteration: the probability of
UP at the two '!', how far apart φ puts them, and V in every state. Per run:

    at the bottom '!'   share of the total decrease that would not have been, had each update left the policy of the
                        bottom '!' as it was: what the praise of UP at the top did to the bottom
    while merged        share of the total decrease by updates of a φ that puts the two '!' closer than half the mean
                        distance of two states
    drawn together      share of the total decrease by updates that bring the two '!' closer, beside the share of such
                        updates among all
    worst state         total decrease of the state that an update hurts most, Σ_n max_s max(0, V_n(s) - V_{n+1}(s))
    penalty             mean of α_R ℓ_R + α_P ℓ_P, where the advantages have standard deviation 1

30 runs of 20 to 60 s; finished ones are skipped. Tables and a picture in benchmark/results/confounding.
"""

import argparse
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import confounding_gridworld as cg
from benchmark.common import markdown, read_table
from benchmark.studies import confounding

MERGED = 0.5  # relative distance of the two '!'
MEASURES = {
    "decrease": "total decrease of V(start)",
    "at_bottom": "at the bottom '!'",
    "while_merged": "while merged",
    "drawn_together": "drawn together",
    "updates_together": "updates that draw together",
    "worst_state": "worst state",
    "penalty": "penalty",
}
COLUMNS = ["method", "seed", *MEASURES, "versions", "git_commit"]
CURVES = {"V_start": "V(start)", "up_top": "π(UP | top '!')", "up_bottom": "π(UP | bottom '!')", "distance": "distance"}
SHOWN = 1  # the seed of the picture


def total_falls(before: np.ndarray, after: np.ndarray) -> float:
    """Sum of what `after` lies below `before`."""
    return np.maximum(0, before - after).sum()


def measures(history: cg.History, world: cg.Gridworld, gamma: float) -> dict[str, float]:
    """The measures of a run; shares are nan where V never fell."""
    V, pi, (_, bottom) = history.V, history.pi, world.critical
    bottom_as_it_was = pi[1:].copy()
    bottom_as_it_was[:, bottom] = pi[:-1, bottom]
    V_frozen = cg.value(world.P, world.R, bottom_as_it_was, gamma)[:, world.start]
    V_start, merged, together = V[:, world.start], history.distance[:-1] < MERGED, np.diff(history.distance) < 0
    decrease = total_falls(V_start[:-1], V_start[1:])
    with np.errstate(invalid="ignore"):
        shares = {
            "at_bottom": 1 - total_falls(V_start[:-1], V_frozen) / decrease,
            "while_merged": total_falls(V_start[:-1][merged], V_start[1:][merged]) / decrease,
            "drawn_together": total_falls(V_start[:-1][together], V_start[1:][together]) / decrease,
            "updates_together": together.mean(),
        }
    worst_state = np.maximum(0, V[:-1] - V[1:]).max(-1).sum()
    return {"decrease": decrease} | shares | {"worst_state": worst_state, "penalty": history.penalty.mean()}


def curves(history: cg.History, world: cg.Gridworld) -> dict[str, np.ndarray]:
    """The curves of a run, each (iterations + 1,)."""
    up = history.pi[:, world.critical, cg.UP]
    return {
        "V_start": history.V[:, world.start],
        "up_top": up[:, 0],
        "up_bottom": up[:, 1],
        "distance": history.distance,
    }


def make_runs(workers: int) -> int:
    """Make the runs that the tables lack, and return how many failed."""
    folder = confounding.FOLDER
    made = {(row["method"], int(row["seed"])) for row in read_table(folder / "mechanism.csv")}
    runs = [confounding.run_args("centre", method, seed) for seed in confounding.SEEDS for method in cg.METHODS]
    missing = [(f"{cg.METHODS[a.method]}, seed {a.seed}", a) for a in runs if (a.method, a.seed) not in made]
    versions, failed = confounding.provenance(), 0
    for name, args, result in confounding.results(missing, workers):
        if isinstance(result, cg.RunFailed):
            failed += 1
            print(f"error: {name}: {result}", file=sys.stderr, flush=True)
            continue
        world, own = (
            cg.make_gridworld(args.n_path, args.epsilon, args.gamma),
            {"method": args.method, "seed": args.seed},
        )
        history = result[1]
        found = curves(history, world)
        for i, values in enumerate(zip(*found.values(), strict=True)):
            row = own | {"iteration": i} | {k: f"{v:.5g}" for k, v in zip(found, values, strict=True)}
            confounding.append_row(folder / "mechanism_curves.csv", list(row), row)
        numbers = {name: f"{value:.6g}" for name, value in measures(history, world, args.gamma).items()}
        confounding.append_row(folder / "mechanism.csv", COLUMNS, own | numbers | versions)
        print(f"{name}: {numbers}", flush=True)
    return failed


def table(folder: Path) -> str:
    """Markdown: each method's measures, mean and 95 % interval over the runs."""
    rows = []
    for method, name in cg.METHODS.items():
        own = [row for row in read_table(folder / "mechanism.csv") if row["method"] == method]
        if own:
            numbers = {measure: np.array([float(row[measure]) for row in own]) for measure in MEASURES}
            cells = [confounding.cell(x) if np.isfinite(x).all() else "" for x in numbers.values()]
            rows.append([name, str(len(own)), *cells])
    return markdown(["method", "seeds", *MEASURES.values()], rows)


def draw(folder: Path) -> None:
    """The curves of one seed, a column per method, into mechanism.png."""
    rows = [row for row in read_table(folder / "mechanism_curves.csv") if row["seed"] == str(SHOWN)]
    figure, axes = plt.subplots(len(CURVES) - 1, len(cg.METHODS), figsize=(14, 8), sharex=True, sharey="row")
    steps = cg.Args.num_envs * cg.Args.num_steps
    for column, (method, name) in zip(axes.T, cg.METHODS.items(), strict=True):
        own = {int(row["iteration"]): row for row in rows if row["method"] == method}  # a run made again counts once
        x = np.array(sorted(own)) * steps
        for curve, label in CURVES.items():
            axis = column[{"V_start": 0, "up_top": 1, "up_bottom": 1, "distance": 2}[curve]]
            colour = {"up_top": "#56B4E9", "up_bottom": "#D55E00"}.get(curve, cg.COLOURS[method])
            axis.plot(x, [float(own[i][curve]) for i in sorted(own)], color=colour, lw=1.8, label=label)
        column[0].set_title(f"{name}, seed {SHOWN}")
        column[2].axhline(MERGED, color="black", ls=":", lw=1)
        column[2].set_xlabel("environment steps")
    axes[0, 0].set_ylabel("exact V(start)")
    axes[1, 0].set_ylabel("probability of UP")
    axes[1, 0].legend(fontsize=9)
    axes[2, 0].set_ylabel("relative distance of the '!'")
    cg.save(figure, folder / "mechanism.png")


def main(arguments: list[str] | None = None) -> None:
    """The runs that are missing, then table and picture."""
    whole = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmark.studies.confounding_mechanism", description=__doc__, formatter_class=whole
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (default: one per core)")
    workers = parser.parse_args(arguments).workers
    if workers < 1:
        confounding.refuse(f"--workers: got {workers}; must be at least 1")
    confounding.FOLDER.mkdir(parents=True, exist_ok=True)
    failed = make_runs(workers)
    draw(confounding.FOLDER)
    print(table(confounding.FOLDER))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
