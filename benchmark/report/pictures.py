"""Pictures: one name and colour for a method in every figure of the benchmark, and the report's kinds of figures."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np

from benchmark.report.aggregation import Curves, Estimates, bounds

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

# A method has one name, colour and line in every figure; Okabe's and Ito's colours, which colour-blind eyes tell apart.
# Lines differ as well, so that curves that coincide are seen to.
NAMES = {
    "ppo": "PPO",
    "additive": "additive",
    "deep_spi": "Deep SPI",
    "deepmdp": "DeepMDP",
    "sb3": "PPO of SB3",
    "ppo-fp32": "PPO, float32",
    "deep_spi-chunk-1": "Deep SPI, chunks of 1",
    "gated": "gated",
    "dream_spi": "DreamSPI",
    "spr": "SPR",
    "dbc": "DBC",
    "spr-utility": "SPR, in the utility",
    "dbc-utility": "DBC, in the utility",
    "spr-none": "SPR's network, no loss",
    "dbc-none": "DBC's network, no loss",
}
COLOURS = {
    "ppo": "#0072B2",
    "additive": "#E69F00",
    "deep_spi": "#009E73",
    "deepmdp": "#D55E00",
    "sb3": "#CC79A7",
    "ppo-fp32": "#56B4E9",
    "deep_spi-chunk-1": "#000000",
    "gated": "#7F3C8D",
    "dream_spi": "#882255",
    "spr": "#332288",
    "dbc": "#117733",
    "spr-utility": "#88CCEE",
    "dbc-utility": "#DDCC77",
    "spr-none": "#AA4499",
    "dbc-none": "#999933",
}
OTHER_COLOURS = ("#A0522D", "#A5AA99", "#80BA5A", "#8B4513", "#4B4B8F", "#C0A000", "#E68310", "#3969AC")
LINES = {"additive": "-.", "deep_spi": "--", "sb3": ":", "ppo-fp32": "--", "deep_spi-chunk-1": ":", "dream_spi": ":"}
MOST_BANDS = 3  # in one panel; with more intervals than that it is a fog


def colours(algorithms: Iterable[str]) -> dict[str, str]:
    """Each algorithm's colour; of others than the project's own, in the order in which they come."""
    others = itertools.cycle(OTHER_COLOURS)
    return {name: COLOURS.get(name) or next(others) for name in algorithms}


def called(algorithm: str) -> str:
    """The algorithm's name in figures and in tables for print."""
    return NAMES.get(algorithm, algorithm)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write path.png and path.pdf for print, without a date or version that would make them differ each time."""
    figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
    with plt.rc_context({"pdf.fonttype": 42}):  # TrueType, which publishers ask for
        figure.savefig(path.with_suffix(".pdf"), metadata=dict.fromkeys(("Creator", "Producer", "CreationDate")))
    plt.close(figure)


def draw_bars(
    estimates: Estimates,
    look: dict[str, str],
    titles: list[str],
    label: str,
    path: Path,
    neutral: float | None = None,
) -> Path:
    """A panel per title: the number of that position of every entry, its interval as a bar. `neutral` gets a line.

    `look` has every algorithm's colour.
    """
    size = (max(6, 3 * len(titles)), 1.2 + 0.4 * len(estimates))
    figure, axes = plt.subplots(1, len(titles), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for i, (axis, title) in enumerate(zip(axes[0], titles, strict=True)):
        for y, (name, estimated) in enumerate(estimates.items()):
            point, low, high = bounds(estimated, i)
            axis.fill_betweenx([y - 0.3, y + 0.3], low, high, color=look[name], alpha=0.4, linewidth=0)
            axis.plot([point, point], [y - 0.3, y + 0.3], color=look[name], linewidth=3)
        if neutral is not None:
            axis.axvline(neutral, color="0.5", linestyle="--", linewidth=1)
            axis.set_xlim(0, 2 * neutral)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(3 if len(titles) > 1 else 5))
        axis.tick_params(labelsize=9)
        axis.set_ylim(len(estimates) - 0.4, -0.6)  # the first on top
    axes[0, 0].set_yticks(range(len(estimates)), [called(name) for name in estimates])
    save_figure(figure, path)
    return path


def draw_curves(
    panels: dict[str, Curves], look: dict[str, str], labels: tuple[str, str], path: Path, stairs: bool = False
) -> Path:
    """A panel per title, with a curve for each entry and its interval shaded. `labels` are the axes'.

    An interval much wider than all curves is cut. A single panel with more than MOST_BANDS intervals becomes one for
    each, in which the other curves are grey.
    """
    apart = len(panels) == 1 and len(*panels.values()) > MOST_BANDS
    if apart:
        ((_, curves),) = panels.items()
        panels = {called(name): curves for name in curves}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (6, 3.8) if len(panels) == 1 else (3.6 * columns, 2.6 * rows + 0.4)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", sharex=apart, sharey=apart
    )
    drawn = {"drawstyle": "steps-post" if stairs else "default"}, {"step": "post" if stairs else None}
    handles = {}
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for name, (x, estimated) in curves.items():
            if apart and called(name) != title:
                axis.plot(x, estimated.point, color="0.8", linewidth=1, zorder=1, **drawn[0])
                continue
            line = {"color": look[name], "linestyle": "-" if apart else LINES.get(name, "-"), "linewidth": 1.8}
            (handles[called(name)],) = axis.plot(x, estimated.point, **line, **drawn[0])
            axis.fill_between(x, estimated.low, estimated.high, color=look[name], alpha=0.2, linewidth=0, **drawn[1])
        points = np.concatenate([estimated.point for _, estimated in curves.values()])
        points = points[~np.isnan(points)]
        low, high = (points.min(), points.max()) if len(points) else (0, 0)
        if high > low:  # or else the intervals of two seeds would make every curve flat
            least, most = axis.get_ylim()
            axis.set_ylim(max(least, low - (high - low) / 2), min(most, high + (high - low) / 2))
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        if axis.get_xlim()[1] >= 1000:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 1.5M
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    if not apart:
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
    save_figure(figure, path)
    return path
