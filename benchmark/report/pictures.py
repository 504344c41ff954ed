"""Pictures: one colour for a method in every figure of the benchmark, and the report's kinds of figures."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np

from benchmark.report.aggregation import Estimates, bounds

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# A method has one colour in every figure; Okabe's and Ito's, which colour-blind eyes tell apart.
COLOURS = {
    "ppo": "#0072B2",
    "additive": "#E69F00",
    "deep_spi": "#009E73",
    "deepmdp": "#D55E00",
    "sb3": "#CC79A7",
    "ppo-fp32": "#56B4E9",
    "deep_spi-chunk-1": "#000000",
    "gated": "#7F3C8D",
}
OTHER_COLOURS = ("#A0522D", "#A5AA99", "#80BA5A", "#8B4513", "#4B4B8F", "#C0A000", "#E68310", "#3969AC")


def colours(algorithms: Iterable[str]) -> dict[str, str]:
    """Each algorithm's colour; of others than the project's own, in the order in which they come."""
    others = itertools.cycle(OTHER_COLOURS)
    return {name: COLOURS.get(name) or next(others) for name in algorithms}


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write path.png and path.pdf for print, without a date or version that would make them differ each time."""
    figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
    figure.savefig(path.with_suffix(".pdf"), metadata=dict.fromkeys(("Creator", "Producer", "CreationDate")))
    plt.close(figure)


def draw_bars(estimates: Estimates, titles: list[str], label: str, path: Path, neutral: float | None = None) -> Path:
    """A panel per title: the number of that position of every entry, its interval as a bar. `neutral` gets a line."""
    size = (max(6, 3 * len(titles)), 1.2 + 0.4 * len(estimates))
    figure, axes = plt.subplots(1, len(titles), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for i, (axis, title) in enumerate(zip(axes[0], titles, strict=True)):
        for y, (name, estimated) in enumerate(estimates.items()):
            colour = colours(estimates)[name]
            point, low, high = bounds(estimated, i)
            axis.fill_betweenx([y - 0.3, y + 0.3], low, high, color=colour, alpha=0.4, linewidth=0)
            axis.plot([point, point], [y - 0.3, y + 0.3], color=colour, linewidth=3)
        if neutral is not None:
            axis.axvline(neutral, color="0.5", linestyle="--", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.set_ylim(len(estimates) - 0.4, -0.6)  # the first on top
    axes[0, 0].set_yticks(range(len(estimates)), list(estimates))
    save_figure(figure, path)
    return path


def draw_curves(panels: dict[str, tuple[np.ndarray, Estimates]], labels: tuple[str, str], path: Path) -> Path:
    """A panel per title: x (points,) and a curve for each entry, its interval shaded. `labels` are the axes'."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (7, 4) if len(panels) == 1 else (4 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, (x, estimates)) in zip(axes.flat, panels.items(), strict=False):
        for name, colour in colours(estimates).items():
            axis.plot(x, estimates[name].point, color=colour, label=name)
            axis.fill_between(x, estimates[name].low, estimates[name].high, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    save_figure(figure, path)
    return path
