"""Suite `early`: the defaults against what they could be. Protocol:

Outcomes of a run: the mean return of its final policy, actions sampled, in 64 new games
(`python evaluate.py RUN --episodes 64 --policy sampled`), which is the primary one; that of its last 100 games in
training; and that of all its games in training. The last two were fixed before any run was looked at. They say less
than they seem to: a run has 2,336 steps of each of 128 games, so that most of its last 100 games began with the
untrained policy. This was noticed when the runs of PPO had been looked at; the first outcome was then added, and every
run made (or, for PPO, made again) with its final policy kept. It was fixed when two final policies had been evaluated,
one of Deep SPI and one of SB3. A default is found worse than its alternative, and is not to be the default, if an
interval lies below 0, or if all three differences lie more than 5 % of the alternative's mean below 0. Otherwise it
stays, because it is the faster: that is not a proof of equality. The rule is for settings. Deep SPI, DeepMDP and PPO
are methods, each with settings of its own: DeepMDP plays 64 games side by side, so that its games in training compare
with nobody's. (These two sentences are later than the runs.)
"""

from benchmark.common import RESULTS, markdown, mean_interval
from benchmark.report.scores import FINAL, LAST, OUTCOMES, Scores, cell, difference, visible_cell

FOLDER = RESULTS / "suites" / "early"
COMPARISONS = {  # of suite `early`: what is asked, the default, its alternative
    "PPO, bf16 − float32": ("ppo", "ppo-fp32"),
    "Deep SPI, chunks of 8 − of 1": ("deep_spi", "deep_spi-chunk-1"),
    "PPO, float32 − Stable-Baselines3's": ("ppo-fp32", "sb3"),
    "Deep SPI − PPO": ("deep_spi", "ppo"),
    "Deep SPI − DeepMDP": ("deep_spi", "deepmdp"),
}


def score_table(scores: Scores) -> str:
    """Markdown, of a suite with one task: each algorithm's outcomes, mean and Student's 95 % interval over seeds."""
    (algorithms,) = scores.values()
    rows = []
    for algorithm, own in algorithms.items():
        means = [cell(own[name].mean(), *mean_interval(own[name]), "z.0f") if name in own else "" for name in OUTCOMES]
        each = next(", ".join(f"{value:z.0f}" for value in own[name]) for name in (FINAL, LAST) if name in own)
        rows.append([algorithm, str(len(own[LAST])), *means, each])
    return markdown(["algorithm", "seeds", *OUTCOMES, "each seed's first outcome"], rows)


def difference_table(scores: Scores) -> str:
    """Markdown, of a suite with one task: every comparison of which there are two runs of each side or more."""
    (algorithms,) = scores.values()
    rows = []
    for question, (default, alternative) in COMPARISONS.items():
        sides = algorithms.get(default, {}), algorithms.get(alternative, {})
        for name in (name for name in OUTCOMES if all(len(side.get(name, ())) > 1 for side in sides)):
            a, b = sides[0][name], sides[1][name]
            interval = difference(a, b)
            share = f"{interval[0] / abs(b.mean()):+z.0%}"
            seeds, visible = f"{len(a)}, {len(b)}", visible_cell(a, b, "z.0f")
            rows.append([question, name, seeds, cell(*interval, "+z.0f"), share, visible])
    header = ["comparison", "outcome", "seeds", "difference [95 % interval]", "of the latter's mean", "could have seen"]
    return markdown(header, rows)
