"""Suite `auxiliary`, kinds of auxiliary loss and their places: python -m benchmark.studies.auxiliary FOLDER

FOLDER is the suite's (runs/benchmark/auxiliary). Keeps its finished runs in results/suites/auxiliary, and what each
paid of its own loss in each tenth of training, with its policy's entropy, in results/auxiliary_losses.csv. The tables
come from these. The protocol is in benchmark/PROTOCOL.md, under "Evidence at length".
"""

import argparse
import itertools
from pathlib import Path

from benchmark.common import RESULTS, markdown, mean_interval, read_table
from benchmark.launch.keep import keep
from benchmark.report.scores import FINAL, LAST, Scores, cell, difference, read_scores, visible_cell
from benchmark.studies.by_tenths import add, column, rows_of
from benchmark.studies.transition import TENTHS

FOLDER, FILE = RESULTS / "suites" / "auxiliary", RESULTS / "auxiliary_losses.csv"
KEY = ("algorithm", "task", "seed")
METRICS = {  # column → metric
    "transition": "world_model/transition_loss",
    "transition_mean": "world_model/transition_loss_mean",
    "transition_copy": "world_model/transition_loss_copy",
    "error_ratio": "world_model/transition_error_ratio",
    "reward": "world_model/reward_loss",
    "reward_zero": "world_model/reward_loss_zero",
    "spr": "world_model/spr_loss",
    "spr_copy": "world_model/spr_loss_copy",
    "spr_constant": "world_model/spr_loss_mean",
    "bisimulation": "world_model/bisimulation_loss",
    "bisimulation_constant": "world_model/bisimulation_loss_constant",
    "latent_variance": "world_model/latent_variance",
    "penalty": "spi/penalty_mean",
    "entropy": "losses/entropy",
}
CELLS = {  # the loss table's columns → metrics: own loss, then what trivial predictors pay
    "ℓ_P : copying": ("transition_mean", "transition_copy"),
    "error of P̄'s mean / copying's": ("error_ratio",),
    "ℓ_R : always 0": ("reward", "reward_zero"),
    "ℓ_SPR : copying : mean target": ("spr", "spr_copy", "spr_constant"),
    "ℓ_B : one latent": ("bisimulation", "bisimulation_constant"),
    "variance of z": ("latent_variance",),
    "penalty": ("penalty",),
}
FIGURE_7 = {
    "transition": "L_P, of a sample of P̄",
    "transition_mean": "L_P, of its mean",
    "transition_copy": "L_P of copying",
    "reward": "L_R",
}
NAMES = {
    "ppo": "PPO",
    "deepmdp": "DeepMDP",
    "deep_spi": "Deep SPI",
    "additive": "Deep SPI, additive",
    "spr-none": "SPR's network, no loss",
    "spr": "SPR",
    "spr-utility": "SPR in the utility",
    "dbc-none": "DBC's network, no loss",
    "dbc": "DBC",
    "dbc-utility": "DBC in the utility",
}
COMPARISONS = [  # in the protocol's order: a loss against none, then its two places
    ("deepmdp", "ppo"),
    ("deep_spi", "ppo"),
    ("additive", "ppo"),
    *(
        (f"{kind}{place}", base)
        for kind in ("spr", "dbc")
        for base in (f"{kind}-none", "ppo")
        for place in ("", "-utility")
    ),
    ("deep_spi", "additive"),
    ("spr-utility", "spr"),
    ("dbc-utility", "dbc"),
]


def collect(folder: Path) -> int:
    """Keep the finished runs, with their losses and entropies; return the runs' number."""
    runs = [(run_dir, dict(zip(KEY, run_dir.parts[-3:], strict=True))) for run_dir in keep(folder, FOLDER)]
    add(FILE, [row for run_dir, key in runs for row in rows_of(run_dir, key, METRICS)])
    return len(runs)


def scores() -> Scores:
    """Every outcome of the kept runs; nothing if there are none."""
    return read_scores(FOLDER) if any(FOLDER.glob("*/*/*/done.json")) else {}


def score_table() -> str:
    """Markdown: each algorithm's final policies and last games, mean with Student's 95 % interval, and every seed."""
    rows = []
    for task, algorithms in scores().items():
        for name, called in NAMES.items():
            if name in algorithms:
                own = algorithms[name]
                means = [
                    cell(own[outcome].mean(), *mean_interval(own[outcome]), "z.1f") if outcome in own else ""
                    for outcome in (FINAL, LAST)
                ]
                each = ", ".join(f"{value:z.1f}" for value in own.get(FINAL, ()))
                rows.append([task, called, str(len(own[LAST])), *means, each])
    header = ["task", "algorithm", "seeds", f"{FINAL}, 64 games", LAST, "final policy of each seed"]
    return markdown(header, rows) if rows else "None yet."


def difference_table() -> str:
    """Markdown: the protocol's comparisons of final policies with two runs of each side or more, by Welch's test."""
    rows = []
    for task, algorithms in scores().items():
        for names in COMPARISONS:
            a, b = (algorithms.get(name, {}).get(FINAL, ()) for name in names)
            if min(len(a), len(b)) > 1:
                question = " − ".join(NAMES[name] for name in names)
                interval = cell(*difference(a, b), "+z.1f")
                rows.append([task, question, f"{len(a)}, {len(b)}", interval, visible_cell(a, b, "z.1f")])
    header = ["task", "comparison", "seeds", "difference [95 % interval]", "could have seen"]
    return markdown(header, rows) if rows else "None yet."


def loss_table() -> str:
    """Markdown, medians of the last tenth: own loss and trivial predictors', means over seeds; each seed's entropy."""
    rows = []
    runs = {(row["task"], row["algorithm"]) for row in read_table(FILE)}
    for task, name in ((task, name) for task in sorted({run[0] for run in runs}) for name in NAMES):
        if (task, name) not in runs:
            continue
        of = {each: column(FILE, TENTHS, each, task=task, algorithm=name) for each in METRICS}
        row = [task, NAMES[name], str(len(of["entropy"]))]
        for names in CELLS.values():
            own = names[0] if len(of[names[0]]) else names[0].removesuffix("_mean")  # DBC's ℓ_P is a density's
            row.append(" : ".join(f"{of[each].mean():.2g}" for each in (own, *names[1:]) if len(of[each])))
        rows.append([*row, ", ".join(f"{value:.2f}" for value in of["entropy"])])
    header = ["task", "algorithm", "seeds", *CELLS, "entropy of π, each seed"]
    return markdown(header, rows) if rows else "None yet."


def deepmdp_table() -> str:
    """Markdown, the paper's figure 7: losses of Deep SPI and of DeepMDP over training, and Welch's 95 % interval."""
    rows = []
    tasks = dict.fromkeys(row["task"] for row in read_table(FILE))
    for task, tenth, (name, label) in itertools.product(tasks, (1, 2, 5, TENTHS), FIGURE_7.items()):
        a, b = (column(FILE, tenth, name, task=task, algorithm=side) for side in ("deep_spi", "deepmdp"))
        if min(len(a), len(b)) > 1:
            means = f"{a.mean():.2g}", f"{b.mean():.2g}"
            interval = cell(*difference(a, b), "+.2g")
            rows.append([task, f"{tenth} of {TENTHS}", label, f"{len(a)}, {len(b)}", *means, interval])
    header = ["task", "tenth", "loss", "seeds", "Deep SPI", "DeepMDP", "difference [95 % interval]"]
    return markdown(header, rows) if rows else "None yet."


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmark.studies.auxiliary", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the suite's folder in benchmark.run's results")
    print(f"{collect(parser.parse_args(words).folder)} finished runs in {FOLDER}")
    print(score_table(), difference_table(), loss_table(), deepmdp_table(), sep="\n\n")


if __name__ == "__main__":
    main()
