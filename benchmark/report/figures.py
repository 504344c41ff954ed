"""The documents' tables and pictures from the committed results: python -m benchmark.figures

Each table stands in README.md, in benchmark/README.md or in docs/, between `<!-- table: NAME -->` and `<!-- end -->`,
and is written anew there.
"""

import functools
import re

from benchmark.common import RESULTS, ROOT, markdown
from benchmark.report.scores import read_scores
from benchmark.studies import (
    atari_200k,
    auxiliary,
    clip,
    confounding,
    confounding_mechanism,
    control,
    corridors,
    early,
    every_game,
    long,
    mujoco,
    parallelism,
    pilot,
    placements,
    planning,
    pretrained,
    theory,
    throughput,
    transition,
    whole_games,
)
from benchmark.suites import MEASURED_SPS, PRICED_AS, SUITES

DOCUMENTS = (ROOT / "README.md", ROOT / "benchmark" / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def cost_table() -> str:
    """Per suite: runs, steps, and core-hours if every script ran as fast as it was measured with default settings.

    No core-hours where a script has not been measured.
    """
    rows = []
    for name, suite in SUITES.items():
        runs = len(suite.algorithms) * len(suite.tasks) * suite.seeds
        steps = suite.seeds * sum(task.total_timesteps for task in suite.tasks)  # of one algorithm
        scripts = [PRICED_AS.get(algorithm.script, algorithm.script) for algorithm in suite.algorithms.values()]
        speeds = [MEASURED_SPS[script] for script in scripts if script in MEASURED_SPS]
        hours = f"{sum(steps / sps * threads for sps, threads in speeds) / 3600:,.1f}"
        cost = hours if len(speeds) == len(scripts) else "not measured"
        rows.append([f"`{name}`", f"{runs:,}", f"{len(scripts) * steps / 1e6:,.1f} M", cost])
    return markdown(["suite", "runs", "agent steps in all", "core-hours"], rows)


TABLES = {
    "control_scores": lambda: control.placement_score_table(read_scores(control.FOLDER)),
    "control_differences": lambda: control.placement_difference_table(read_scores(control.FOLDER)),
    "gated": lambda: control.gated_table(read_scores(control.FOLDER), read_scores(control.GATED)),
    "planning_control": planning.control_table,
    "planning": planning.planning_table,
    "planning_outcome": planning.outcome,
    "planning_longer": planning.longer_table,
    "planning_processor": planning.processor_table,
    "planning_horizons": planning.horizons_table,
    "planning_published": planning.published_table,
    "planning_atari": planning.atari_table,
    "atari_200k": atari_200k.table,
    "clip": clip.table,
    "speed_ratios": lambda: throughput.ratio_table(RESULTS),
    "speed_ratios_amx": lambda: throughput.ratio_table(RESULTS / "throughput_amx"),
    "speed_ratios_spr": lambda: throughput.ratio_table(RESULTS / "throughput_spr", of="spr"),
    "speed": lambda: throughput.speed_table(RESULTS),
    "confounding": lambda: confounding.drawdown_table(confounding.by_setting(confounding.read_runs())),
    "mechanism": lambda: confounding_mechanism.table(confounding.FOLDER),
    "corridors": corridors.table,
    "corridors_differences": corridors.difference_table,
    "corridors_search": corridors.search_table,
    "early_scores": lambda: early.score_table(read_scores(early.FOLDER)),
    "early_differences": lambda: early.difference_table(read_scores(early.FOLDER)),
    "planning_bound": theory.table,
    "every_game": every_game.table,
    "long_scores": long.score_table,
    "long_policies": long.policies_table,
    "long_losses": long.loss_table,
    "auxiliary_scores": auxiliary.score_table,
    "auxiliary_differences": auxiliary.difference_table,
    "auxiliary_losses": auxiliary.loss_table,
    "figure_7": auxiliary.deepmdp_table,
    "parallelism_scores": parallelism.score_table,
    "parallelism_differences": parallelism.difference_table,
    "parallelism_policies": parallelism.policy_table,
    "mujoco_scores": lambda: mujoco.score_table(read_scores(mujoco.FOLDER)),
    "mujoco_differences": lambda: mujoco.difference_table(read_scores(mujoco.FOLDER)),
    "pilot": pilot.table,
    "authors_ppo": pilot.authors_table,
    "pretrained": pretrained.table,
    "placements": placements.table,
    "transition": transition.transition_table,
    "transition_rewards": transition.reward_table,
    "cost": cost_table,
    **{
        name: functools.partial(lambda table: table(whole_games.read(whole_games.CSV)), table)
        for name, table in whole_games.TABLES.items()
    },
}


def with_tables(document: str) -> str:
    """The document's text with every table written anew. Raises KeyError for a table that nobody knows."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3],
        document,
        flags=re.DOTALL,
    )


def main() -> None:
    """Tables and pictures."""
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
    clip.draw()
    control.draw()
    corridors.draw()
    long.draw()
    throughput.draw(RESULTS)
    confounding.draw_pictures(confounding.by_setting(confounding.read_runs()))
    confounding_mechanism.draw(confounding.FOLDER)
    placements.draw()
    planning.draw()
    planning.draw_control()
    transition.draw()
    print("the documents and the pictures in benchmark/results are up to date with the CSV files there")
