"""Draw a Picture with matplotlib: a map of figures by layer and kind of matrix, beside a histogram of elements.

Each tensor is a cell of a map rather than a point, so that 400 of them stay apart and one that stands out is seen.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from surgery.errors import OutputError, SettingError
from surgery.inspect.name_patterns import depths, without_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Density = Callable[[np.ndarray], np.ndarray]
"""Probability density at values of shape (n,), shape (n,)."""

_MOST_KINDS = 48
_LONGEST_KIND = 44
_MOST_NUMBERED = 13  # layers: of more, the figures would overlap


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
        title: one line.
        values: a figure for each tensor by name; None for one that has none, NaN for one that cannot be compared.
        what: what the figures are.
        expected: the figure that every tensor should have, if there is one.
        histogram: of elements.
        missing: why a tensor has no figure.
    """

    title: str
    values: Mapping[str, float | None]
    what: str
    expected: float | None
    histogram: Histogram
    missing: str = "unchanged"


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written in the end.

    Raises:
        SettingError: not a .png, or matplotlib is not installed.
        OutputError: its folder does not exist.
    """
    if path.suffix.lower() != ".png":
        raise SettingError(f"--plot: expected a file that ends in .png, got {path}. Correct the name.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"--plot: expected a folder that exists, got {path.parent}. Make it first.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingError(
            "--plot: expected matplotlib, got no such package. Install it with `pip install 'model-surgery[plot]'`."
        ) from error


def draw(picture: Picture, path: Path) -> None:
    """Write a picture as PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds, layers, grid = _lay_out(picture.values)
    width = min(max(3.0, 0.28 * len(layers)), 11.0)
    figure = Figure(figsize=(width + 9.0, max(4.2, 1.6 + 0.2 * len(kinds))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(picture.title)
    left, right = figure.subplots(1, 2, width_ratios=[width + 2.5, 5.0])
    _draw_map(figure, left, picture, kinds, layers, grid)
    _draw_histogram(right, picture.histogram)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"{path}: expected a file to write, got {error.strerror}. Choose another.") from error


def _lay_out(values: Mapping[str, float | None]) -> tuple[list[str], list[int | None], np.ndarray]:
    """Place every tensor in a grid of kinds by layers; those that share a cell get their root mean square.

    Returns:
        The kinds, those in layers first, in order of appearance; the layers, none of them first; the grid, NaN where
        there is no tensor, -Inf where a tensor has no figure, Inf where one cannot be compared.
    """
    layer_of = depths(values)
    kind_of = {name: without_numbers(name) for name in values}
    layered = dict.fromkeys(kind_of[name] for name, layer in layer_of.items() if layer is not None)
    kinds = [*layered, *dict.fromkeys(found for found in kind_of.values() if found not in layered)]
    rows = {found: min(row, _MOST_KINDS - 1) for row, found in enumerate(kinds)}
    layers = sorted(set(layer_of.values()), key=lambda layer: -1 if layer is None else layer)
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for name, value in values.items():
        cells[rows[kind_of[name]], layers.index(layer_of[name])] += [] if value is None else [value]
    grid = np.full((min(len(kinds), _MOST_KINDS), len(layers)), math.nan)
    for place, found in cells.items():
        rms = math.sqrt(sum(value * value for value in found) / len(found)) if found else -math.inf
        grid[place] = math.inf if math.isnan(rms) else rms
    return _labels(kinds, list(layered)), layers, grid


def _labels(kinds: list[str], layered: list[str]) -> list[str]:
    """Shorten the kinds' names: by what all those in layers begin with, and to what can be read."""
    columns = zip(*(kind.split(".")[:-1] for kind in layered), strict=False)
    prefix = "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    labels = [kind.removeprefix(prefix) if kind in layered else kind for kind in kinds]
    labels = [label if len(label) <= _LONGEST_KIND else "…" + label[1 - _LONGEST_KIND :] for label in labels]
    if len(labels) > _MOST_KINDS:
        labels[_MOST_KINDS - 1 :] = [f"{len(labels) - _MOST_KINDS + 1} more kinds"]
    return labels


def _draw_map(
    figure: "Figure",
    axes: "Axes",
    picture: Picture,
    kinds: Sequence[str],
    layers: Sequence[int | None],
    grid: np.ndarray,
) -> None:
    norm = _norm(grid[np.isfinite(grid)], picture.expected)
    axes.set_facecolor("0.9")
    shown = np.ma.masked_invalid(grid)
    image = axes.imshow(shown, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
    step = math.ceil(len(layers) / 24)
    ticks = [place for place, layer in enumerate(layers) if layer is None or layer % step == 0]
    axes.set_xticks(ticks, ["none" if layers[i] is None else str(layers[i]) for i in ticks], fontsize=7)
    marks = [f"= : {picture.missing}"] if np.isneginf(grid).any() else []
    marks += ["x : not comparable"] if np.isposinf(grid).any() else []
    axes.set_xlabel("        ".join(["layer", *marks]))
    axes.set_title(f"{picture.what}, by kind of matrix and layer", fontsize=9)
    for (row, column), value in np.ndenumerate(grid):
        if math.isinf(value):
            mark, colour = ("=", "0.4") if value < 0 else ("x", "red")
            axes.text(column, row, mark, ha="center", va="center", fontsize=6, color=colour)
        elif len(layers) <= _MOST_NUMBERED and not math.isnan(value):
            colour = "black" if norm(value) > 0.6 else "white"
            axes.text(column, row, f"{value:#.3g}", ha="center", va="center", fontsize=6, color=colour)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    if picture.expected:
        bar.ax.axhline(picture.expected, color="black", linewidth=1)


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
