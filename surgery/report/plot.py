"""Draw a Picture with matplotlib: a map of figures by layer and kind of matrix, beside a histogram of elements.

Each tensor is a cell of a map rather than a point, so that 400 of them stay apart and one that stands out is seen.
"""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import OutputError, SettingError
from surgery.escapes import printable
from surgery.report.grid import Cell, Grid, lay_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Density = Callable[[np.ndarray], np.ndarray]
"""Probability density at values of shape (n,), shape (n,)."""

FORMATS = (".png", ".pdf", ".svg")
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],  # matplotlib's own
    "text.parse_math": False,  # a $ in a name is no formula
    "text.usetex": False,
    "svg.fonttype": "none",  # text that can be searched and copied
    "svg.hashsalt": "surgery",
    "pdf.fonttype": 42,
}
_UNDATED: dict[str, Any] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""What keeps the time out of each format: the same picture is the same bytes."""
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


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written in the end.

    Raises:
        SettingError: of no format that we draw, or matplotlib is not installed.
        OutputError: it is a folder, or its folder does not exist or cannot be written to.
    """
    if path.suffix.lower() not in FORMATS:
        raise SettingError(f"--plot: expected a file that ends in .png, .pdf or .svg, got {path}. Correct the name.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"--plot: expected a folder that exists, got {path.parent}. Make it first.")
    if path.is_dir():
        raise OutputError(f"--plot: expected a file, got the folder {path}. Choose another name.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"--plot: expected a folder to write to, got {path.parent}. Choose another.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingError(
            "--plot: expected matplotlib, got no such package. Install it with `pip install 'model-surgery[plot]'`."
        ) from error


def draw(picture: Picture, path: Path) -> None:
    """Write a picture as PNG, PDF or SVG, by its suffix: whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib import rc_context

    suffix, data = path.suffix.lower(), BytesIO()
    with rc_context(_STYLE):
        compose(picture).savefig(data, format=suffix[1:], metadata=_UNDATED[suffix])
    part = path.with_name(f".surgery-plot-{os.getpid()}.part")
    try:
        part.write_bytes(data.getvalue())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OutputError(f"{path}: expected a file to write, got {error.strerror}. Choose another.") from error


def compose(picture: Picture) -> "Figure":
    """Return a picture as a figure of matplotlib, yet to be rendered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = lay_out(picture.tensors)
    width = min(max(3.0, 0.28 * len(grid.layers)), 11.0)
    height = max(4.8, 2.2 + 0.2 * len(grid.kinds))
    figure = Figure(figsize=(width + 9.0, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{_text(picture.title)}\n{_text(picture.verdict)}", fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=[width + 2.5, 5.0])
    _draw_map(figure, left, picture, grid)
    _draw_histogram(right, picture.histogram)
    return figure


def _text(text: str) -> str:
    """Escape what cannot be drawn: controls, and characters that the font does not have."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in printable(text))


def _draw_map(figure: "Figure", axes: "Axes", picture: Picture, grid: Grid) -> None:
    values = np.full((len(grid.kinds), len(grid.layers)), math.nan)
    for place, cell in grid.cells.items():
        values[place] = math.nan if cell.value is None else cell.value
    norm = _norm(values[np.isfinite(values)], picture.expected)
    image = axes.imshow(np.ma.masked_invalid(values), norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_facecolor(_NO_TENSOR)
    axes.set_yticks(range(len(grid.kinds)), [_text(kind) for kind in grid.kinds], fontsize=7)
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
