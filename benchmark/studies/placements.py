"""The three places of the world model's losses, where updates confound: python -m benchmark.studies.placements

`confounding_gridworld.py` with the losses beside the clip (additive), inside it (Deep SPI), and inside it but stopped
in rows where the clip is active (gated). The protocol is in benchmark/PROTOCOL.md. One version of the code makes all
runs anew: the study of confounding updates has older runs of the first two.

90 runs of half a minute. Finished ones are skipped; `--summary` makes none.
"""

import argparse
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import confounding_gridworld as cg
from benchmark.common import RESULTS, markdown
from benchmark.studies import confounding
from benchmark.studies.confounding import NUMBERS, RUN_COLUMNS, SETTINGS, append_row, cell, final_value, run_key

FOLDER = RESULTS / "placements"
PLACES = {name: cg.NAMES[name] for name in ("additive", "deep_spi", "gated")}
CASES = ["centre", "harder corridor (n 10, ε 0.1)", "DeepMDP's coefficients (1, 1)"]  # settings of that study
PAIRS = [("gated", "deep_spi"), ("gated", "additive"), ("deep_spi", "additive")]
PRIMARY = confounding.PRIMARY  # at the centre
Groups = dict[str, dict[str, dict[int, dict]]]  # groups[setting][method][seed]


def plan() -> dict[tuple[str, ...], tuple[str, cg.Args]]:
    """Every run once, with a name to print, seed by seed."""
    order = [(case, method, seed) for seed in confounding.SEEDS for case in CASES for method in PLACES]
    runs = [(f"{case}, {cg.NAMES[m]}, seed {seed}", confounding.run_args(case, m, seed)) for case, m, seed in order]
    return {run_key(vars(args)): (name, args) for name, args in runs}


def read_runs() -> dict[tuple[str, ...], dict]:
    """The finished runs, with their metrics as numbers."""
    runs = confounding.rows_by_run(FOLDER / "runs.csv", RUN_COLUMNS)
    return {key: run | {name: float(run[name]) for name in NUMBERS} for key, run in runs.items()}


def make_runs(workers: int) -> int:
    """Make the runs that the table lacks, and return how many failed. A failed run is named, and tried again later."""
    finished, versions, failed = read_runs(), confounding.provenance(), 0
    missing = [run for key, run in plan().items() if key not in finished]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (name, args, result) in enumerate(confounding.results(missing, workers), start=1):
        if isinstance(result, cg.RunFailed):
            failed += 1
            print(f"error: {name}: {result}", flush=True)
            continue
        numbers = {key: f"{result[0][key]:.6g}" for key in NUMBERS}
        append_row(FOLDER / "runs.csv", RUN_COLUMNS, {key: vars(args)[key] for key in SETTINGS} | numbers | versions)
        print(f"[{number}/{len(missing)}] {name}: largest drawdown {numbers[PRIMARY]}", flush=True)
    return failed


def by_case() -> Groups:
    """The finished runs, by setting, method and seed."""
    finished, groups = read_runs(), {case: {method: {} for method in PLACES} for case in CASES}
    for case in CASES:
        for method in PLACES:
            keys = {seed: run_key(vars(confounding.run_args(case, method, seed))) for seed in confounding.SEEDS}
            groups[case][method] = {seed: finished[key] for seed, key in keys.items() if key in finished}
    return groups


def table() -> str:
    """Markdown: the largest drawdown and the final V of each placement, and their differences, paired by seed."""
    rows = []
    for case, runs in by_case().items():
        row = [case, str(min(map(len, runs.values())))]
        row += [
            f"{cell(np.array([run[PRIMARY] for run in runs[m].values()]))}; V {final_value(runs[m]):.2f}"
            if runs[m]
            else "no run yet"
            for m in PLACES
        ]
        for one, other in PAIRS:
            both = sorted(runs[one].keys() & runs[other].keys())
            paired = np.array([runs[one][seed][PRIMARY] - runs[other][seed][PRIMARY] for seed in both])
            row.append(f"{cell(paired)}, less in {(paired < 0).sum()} of {len(paired)}" if len(paired) else "")
        rows.append(row)
    pairs = [f"{PLACES[one]} − {PLACES[other]}" for one, other in PAIRS]
    return markdown(["setting", "seeds", *PLACES.values(), *pairs], rows)


def draw() -> None:
    """The largest drawdown of every run (light), with each placement's mean and 95 % interval (dark)."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for row, runs in enumerate(by_case().values()):
        for shift, method in zip((-0.25, 0, 0.25), PLACES, strict=True):
            x, colour = np.array([run[PRIMARY] for run in runs[method].values()]), cg.COLOURS[method]
            if not len(x):
                continue
            axis.plot(x, np.full(len(x), row + shift), "o", color=colour, ms=5, alpha=0.35, mec="none")
            axis.plot(cg.mean_interval(x), [row + shift] * 2, color=colour, lw=2.5)
            axis.plot(
                x.mean(), row + shift, "D", color=colour, ms=7, mec="black", label=None if row else PLACES[method]
            )
    axis.set(xlabel="largest drawdown of V(start) (less is safer)", yticks=range(len(CASES)), yticklabels=CASES)
    axis.invert_yaxis()
    axis.legend()
    figure.savefig(FOLDER / "placements.png", dpi=120, metadata={"Software": None})
    plt.close(figure)


def main(words: list[str] | None = None) -> None:
    """The runs that are missing, then picture and table. Raises SystemExit(1) if a run failed."""
    whole = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmark.studies.placements", description=__doc__, formatter_class=whole
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    parser.add_argument("--summary", action="store_true", help="no runs: picture and table of those that exist")
    given = parser.parse_args(words)
    if given.workers < 1:
        confounding.refuse(f"--workers: got {given.workers}; must be at least 1")
    failed = 0 if given.summary else make_runs(given.workers)
    draw()
    print(table())
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
