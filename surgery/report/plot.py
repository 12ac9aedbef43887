"""Draw a Picture with matplotlib: a map of figures by layer and kind of matrix, beside a histogram of elements.

Each tensor is a cell of a map rather than a point, so that 400 of them stay apart and one that stands out is seen.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from surgery.report.drawing import STYLE, drawable, new_figure, render, write_picture
from surgery.report.grid import Cell, Grid, lay_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Density = Callable[[np.ndarray], np.ndarray]
"""Probability density at values of shape (n,), shape (n,)."""

_MOST_NUMBERED = 13  # layers: of more, the figures would overlap
_MOST_LABELLED = 24
_NARROWEST = 130  # columns of a map: of more, two digits side by side would touch
_NO_TENSOR = "0.85"


@dataclass(frozen=True)
class Histogram:
    """Counts of elements, pooled over tensors.

    Args:
        what: what the elements are.
        edges: of the bins, ascending, shape (n + 1,).
        counts: of the bins, shape (n,).
        outside: how many elements lie beyond the edges.
        density: the density expected of the elements, if there is one.
        density_name: its name.
    """

    what: str
    edges: np.ndarray
    counts: np.ndarray
    outside: int
    density: Density | None = None
    density_name: str = ""


@dataclass(frozen=True)
class Picture:
    """What to draw.

    Args:
        title: whose picture it is, one line.
        verdict: what is to be seen in it, one line.
        tensors: what to draw of each, by name.
        what: what the figures are.
        expected: the figure that every tensor should have, if there is one.
        histogram: of elements.
    """

    title: str
    verdict: str
    tensors: Mapping[str, Cell]
    what: str
    expected: float | None
    histogram: Histogram


def draw(picture: Picture, path: Path) -> None:
    """Write a picture as PNG, PDF or SVG, by its suffix: whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        data = render(compose(picture), path.suffix.lower())
    write_picture(data, path)


def compose(picture: Picture) -> "Figure":
    """Return a picture as a figure of matplotlib, yet to be rendered."""
    grid = lay_out(picture.tensors)
    width = min(max(3.0, 0.28 * len(grid.layers)), 11.0)
    height = max(4.8, 2.2 + 0.2 * len(grid.kinds))
    figure = new_figure(width + 9.0, height)
    figure.suptitle(f"{drawable(picture.title)}\n{drawable(picture.verdict)}", fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=[width + 2.5, 5.0])
    _draw_map(figure, left, picture, grid)
    _draw_histogram(right, picture.histogram)
    return figure


def _draw_map(figure: "Figure", axes: "Axes", picture: Picture, grid: Grid) -> None:
    values = np.full((len(grid.kinds), len(grid.layers)), math.nan)
    for place, cell in grid.cells.items():
        values[place] = math.nan if cell.value is None else cell.value
    norm = _norm(values[np.isfinite(values)], picture.expected)
    image = axes.imshow(np.ma.masked_invalid(values), norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_facecolor(_NO_TENSOR)
    axes.set_yticks(range(len(grid.kinds)), [drawable(kind) for kind in grid.kinds], fontsize=7)
    step, apart = math.ceil(len(grid.layers) / _MOST_LABELLED), len(grid.layers) / _NARROWEST
    ticks = [i for i, layer in enumerate(grid.layers) if layer is None or (layer % step == 0 and not 0 < i < apart)]
    axes.set_xticks(ticks, ["-" if grid.layers[i] is None else str(grid.layers[i]) for i in ticks], fontsize=7)
    axes.set_xlabel("\n".join(_legend(grid)), fontsize=8)
    axes.set_title(f"{picture.what}, by kind of matrix and layer", fontsize=9)
    for (row, column), cell in grid.cells.items():
        if cell.mark:
            _draw_mark(axes, row, column, cell)
        elif len(grid.layers) <= _MOST_NUMBERED and cell.value is not None:
            colour = "black" if norm(cell.value) > 0.6 else "white"
            axes.text(column, row, f"{cell.value:#.3g}", ha="center", va="center", fontsize=6, color=colour)
    bar = figure.colorbar(image, ax=axes, pad=0.02, format="{x:g}")
    bar.ax.yaxis.set_minor_formatter("")
    bar.ax.tick_params(labelsize=7)
    if picture.expected:
        bar.ax.axhline(picture.expected, color="black", linewidth=1)


def _draw_mark(axes: "Axes", row: int, column: int, cell: Cell) -> None:
    """Write a sign on a white cell, which no figure and no missing tensor has."""
    from matplotlib.patches import Rectangle

    assert cell.mark
    colour = "red" if cell.mark.is_alarm else "0.4"
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="white", edgecolor="none"))
    axes.text(column, row, cell.mark.sign, ha="center", va="center", fontsize=6, color=colour)


def _legend(grid: Grid) -> list[str]:
    """Say what the columns and the signs are, of those that are there: a line for each three."""
    marks = dict.fromkeys(cell.mark for cell in grid.cells.values() if cell.mark)
    meanings = [f"{mark.sign} : {mark.why}" for mark in marks]
    if len(grid.cells) < len(grid.kinds) * len(grid.layers):
        meanings.append("grey : no such tensor")
    lines = ["     ".join(meanings[i : i + 3]) for i in range(0, len(meanings), 3)]
    return ["layer (- : in none)" if None in grid.layers else "layer", *lines]


def _norm(values: np.ndarray, expected: float | None) -> "Normalize":
    """Return how values become colours."""
    from matplotlib.colors import LogNorm, Normalize

    if expected:
        # what is as expected has the colour in the middle; what strays by chance, a percent or so, looks the same
        span = max(0.25, float(np.abs(values / expected - 1).max(initial=0)))
        return Normalize(expected * (1 - span), expected * (1 + span))
    if values.size and 0 < values.min() < values.max():  # figures of any size, such as std
        return LogNorm(float(values.min()), float(values.max()))
    return Normalize(0.0, float(values.max(initial=0.0)) or 1.0)


def _draw_histogram(axes: "Axes", histogram: Histogram) -> None:
    total = int(histogram.counts.sum()) + histogram.outside
    density = histogram.counts / (max(total, 1) * np.diff(histogram.edges))
    label = f"{total:,} elements" + (f", {histogram.outside / total:.2%} outside" if histogram.outside else "")
    axes.stairs(density, histogram.edges, fill=True, alpha=0.55, label=label)
    highest = float(density.max(initial=0.0))
    if histogram.density:
        x = np.linspace(histogram.edges[0], histogram.edges[-1], 1001)
        expected = histogram.density(x)
        highest = max(highest, float(expected.max()))
        axes.plot(x, expected, color="black", linewidth=1.2, label=histogram.density_name)
    axes.set_xlim(histogram.edges[0], histogram.edges[-1])
    axes.set_ylim(0, 1.25 * highest or 1.0)
    axes.set_xlabel(histogram.what)
    axes.set_ylabel("density")
    axes.set_title("sampled from all tensors", fontsize=9)
    axes.locator_params(axis="x", nbins=6)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="upper right", frameon=False)
