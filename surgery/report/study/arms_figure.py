"""A row for each arm: every run as a dot, the mean with its interval below it, plain's mean as a line through all.

After figure 3 of the Mixout paper (arXiv:1909.11299), lying down: names of any length and number stay apart.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.report.drawing import drawable, new_figure
from surgery.report.names import tell_apart
from surgery.report.study import dots
from surgery.report.study.colours import ALARM, INK, LINE, MUTED, RUN
from surgery.report.study.runs import Runs, runs_of
from surgery.report.widths import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from surgery.study.collect import Study

_WIDTH, _ROW, _REST = 8.0, 0.4, 1.9  # inches
_NAME, _METRIC = 34, 40  # characters of names
_DOTS, _MEAN, _JITTER = -0.08, 0.3, 0.4  # within a row, which is 1 high
_COLUMNS = (("n", 26), ("failed", 66))  # points right of the axes


def arms_figure(study: "Study") -> "Figure":
    """Draw all arms of a study."""
    runs = runs_of(study)
    figure = new_figure(_WIDTH, _REST + _ROW * len(runs))
    figure.set(**dots.surface())
    axes = figure.add_subplot()
    _set_axes(axes, study, runs)
    for row, one in enumerate(runs):
        _draw_row(axes, row, one, RUN if row else MUTED, edge=float(study.minimize))
    _draw_columns(axes, runs)
    entries = _draw_lines(axes, study, runs)
    dots.add_legend(figure, study, entries, dots.outside(runs, axes.get_xlim()))
    return figure


def _set_axes(axes: "Axes", study: "Study", runs: Sequence[Runs]) -> None:
    dots.style_axes(axes)
    names = tell_apart([one.name for one in runs], _NAME)
    axes.set_yticks(range(len(runs)), [drawable(names[one.name]) for one in runs])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlim(dots.limit(runs))
    axes.locator_params(axis="x", nbins=7)
    axes.set_xlabel(dots.metric_label(study, _METRIC))
    for row in range(1, len(runs)):
        axes.axhline(row - 0.5, color=LINE, linewidth=0.6)


def _draw_row(axes: "Axes", row: int, runs: Runs, colour: str, *, edge: float) -> None:
    offsets = dots.spread(runs.total)
    limits = axes.get_xlim()
    for is_failed in (False, True):
        chosen = [i for i, failed in enumerate(runs.are_failed) if failed == is_failed]
        if not chosen:  # an empty line that is not clipped takes room at the figure's corner
            continue
        xs = [dots.within(runs.values[i], limits) for i in chosen]
        ys = [row + _DOTS + _JITTER * offsets[i] for i in chosen]
        axes.plot(xs, ys, **dots.dots(colour, failed=is_failed), clip_on=False, gid=f"dots-{row}-{is_failed:d}")
    if runs.lost:
        ys = [row + _DOTS + _JITTER * offset for offset in offsets[len(runs.values) :]]
        axes.plot([edge] * runs.lost, ys, transform=axes.get_yaxis_transform(), **dots.LOST)
    if runs.interval:
        ends = [dots.within(end, limits) for end in (runs.interval.low, runs.interval.high)]
        axes.plot(ends, [row + _MEAN] * 2, color=INK, linewidth=1.6, gid=f"interval-{row}")
    if runs.mean is not None:
        mean = dots.within(runs.mean, limits)
        axes.plot([mean], [row + _MEAN], color=INK, **dots.MEAN, clip_on=False, gid=f"mean-{row}")
    if runs.state:
        axes.text(0.5, row, runs.state, transform=axes.get_yaxis_transform(), ha="center", va="center", fontsize=8,
                  color=ALARM, style="italic")  # fmt: skip


def _draw_columns(axes: "Axes", runs: Sequence[Runs]) -> None:
    for title, points in _COLUMNS:
        if title == "failed" and all(one.failed is None for one in runs):
            continue
        cells = [(-0.5, title, MUTED, "bottom")]
        for row, one in enumerate(runs):
            text = str(len(one.values)) if title == "n" else _failed(one)
            cells.append((row, text, ALARM if title == "failed" and one.failed else INK, "center"))
        for y, text, colour, align in cells:
            axes.annotate(text, (1, y), (points, 0), ("axes fraction", "data"), "offset points", ha="right", va=align,
                          fontsize=dots.SMALL, color=colour, annotation_clip=False)  # fmt: skip


def _failed(runs: Runs) -> str:
    return "" if runs.failed is None or not runs.total else f"{runs.failed}/{runs.total}"


def _draw_lines(axes: "Axes", study: "Study", runs: Sequence[Runs]) -> list["Line2D"]:
    """Draw what goes through all rows; return the entries of the legend."""
    threshold = dots.threshold_of(study, axes.get_xlim())
    if threshold is not None:
        axes.axvline(threshold, **dots.THRESHOLD, zorder=0.5, gid="threshold")
    entries = [dots.entry("mean, 95 % interval", color=INK, **dots.MEAN)]
    if runs[0].mean is not None:
        axes.axvline(dots.within(runs[0].mean, axes.get_xlim()), **dots.PLAIN, zorder=0.5, gid="plain")
        entries.append(dots.entry(f"mean of {shorten(runs[0].name, _NAME)}", **dots.PLAIN))
    return [*entries, *dots.run_entries(runs, RUN, has_threshold=threshold is not None)]
