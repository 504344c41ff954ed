"""The report's pictures."""

from pathlib import Path

import matplotlib
import numpy as np

from benchmark.report.aggregation import Estimates, bounds

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw_bars(estimates: Estimates, titles: list[str], label: str, path: Path, neutral: float | None = None) -> Path:
    """A panel per title: the number of that position of every entry, its interval as a bar. `neutral` gets a line."""
    size = (max(6, 3 * len(titles)), 1.2 + 0.4 * len(estimates))
    figure, axes = plt.subplots(1, len(titles), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for i, (axis, title) in enumerate(zip(axes[0], titles, strict=True)):
        for y, estimated in enumerate(estimates.values()):
            point, low, high = bounds(estimated, i)
            axis.fill_betweenx([y - 0.3, y + 0.3], low, high, color="C0", alpha=0.4, linewidth=0)
            axis.plot([point, point], [y - 0.3, y + 0.3], color="C0", linewidth=3)
        if neutral is not None:
            axis.axvline(neutral, color="0.5", linestyle="--", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.set_ylim(len(estimates) - 0.4, -0.6)  # the first on top
    axes[0, 0].set_yticks(range(len(estimates)), list(estimates))
    return save(figure, path)


def draw_curves(panels: dict[str, tuple[np.ndarray, Estimates]], labels: tuple[str, str], path: Path) -> Path:
    """A panel per title: x (points,) and a curve for each entry, its interval shaded. `labels` are the axes'."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (7, 4) if len(panels) == 1 else (4 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, (x, estimates)) in zip(axes.flat, panels.items(), strict=False):
        for i, (name, estimated) in enumerate(estimates.items()):
            axis.plot(x, estimated.point, color=f"C{i}", label=name)
            axis.fill_between(x, estimated.low, estimated.high, color=f"C{i}", alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    return save(figure, path)


def save(figure: plt.Figure, path: Path) -> Path:
    """Write a picture, without the date or version that would make it differ each time."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path
