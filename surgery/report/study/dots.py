"""What both kinds of a study's figures draw: a dot for each run, the mean with its interval, and what they mean."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.report.drawing import drawable
from surgery.report.study.colours import ALARM, INK, LINE, MUTED, SURFACE
from surgery.report.study.runs import failed_rule
from surgery.report.widths import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from surgery.study.collect import Study

SMALL = 8
_GOLDEN = 0.6180339887498949
_METRIC = 40  # characters of its name
_LEGEND_LINE = 110  # characters that fit below a figure
_WIDEST = 40  # times what the middle half of the runs spans: an axis of more shows nothing but the outermost


def spread(n: int) -> list[float]:
    """Return n offsets in (-0.5, 0.5) that keep neighbours apart: multiples of the golden ratio, always the same."""
    return [(i + 0.5) * _GOLDEN % 1 - 0.5 for i in range(n)]


def dots(colour: str, *, failed: bool) -> dict[str, Any]:
    """Return how runs are drawn: those that have failed are hollow and in the colour of an alarm."""
    face = (
        {"markerfacecolor": "none", "markeredgecolor": ALARM, "alpha": 1.0} if failed else {"markeredgecolor": "none"}
    )
    return {"linestyle": "none", "marker": "o", "color": colour, "markersize": 4.2, "alpha": 0.6} | face


LOST: dict[str, Any] = {"linestyle": "none", "marker": "x", "color": ALARM, "markersize": 5, "clip_on": False}
"""How runs without a finite value are drawn, at the edge."""


def metric_label(study: "Study", room: int) -> str:
    """Return what is on the axis of the metric, its name in so many characters at most."""
    return drawable(f"{shorten(study.metric, room)}, {'less' if study.minimize else 'more'} is better")


def style_axes(axes: "Axes") -> None:
    """Give axes the colours of the page, and leave out what says nothing."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    axes.tick_params(labelsize=SMALL, color=LINE, labelcolor=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
        label.set_fontsize(9)


def limit(low_high: "tuple[float, float] | None", values: Sequence[float]) -> tuple[float, float]:
    """Return where an axis of the metric begins and ends: within it lie all values, but for those far outside.

    Args:
        low_high: what must be within it, such as intervals.
        values: of all runs.
    """
    import numpy as np

    known = np.asarray([*values, *(low_high or ())], float)
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    first, third = np.quantile(np.asarray(values or known, float), (0.25, 0.75))
    far = _WIDEST * float(third - first)
    if far and high - low > far:
        low, high = max(low, float(first) - far / 4), min(high, float(third) + far / 4)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def outside(values: Sequence[float], limits: tuple[float, float]) -> list[str]:
    """Say how many runs are drawn at the edge."""
    n = sum(not limits[0] <= value <= limits[1] for value in values)
    return [f"{n} run{'s lie' if n > 1 else ' lies'} far outside, drawn at the edge"] if n else []


def threshold_of(study: "Study", limits: tuple[float, float]) -> float | None:
    """Return where the line of failed runs is drawn, if there is one in sight."""
    rule = study.failed_below
    return rule.value if rule and limits[0] <= rule.value <= limits[1] else None


def add_legend(figure: "Figure", study: "Study", handles: Sequence[Any], notes: Sequence[str] = ()) -> None:
    """Say below a figure what is drawn, which runs have failed, and what else must be known."""
    import textwrap

    lines = [wrapped for text in (failed_rule(study, _METRIC), *notes) for wrapped in textwrap.wrap(text, _LEGEND_LINE)]
    legend = figure.legend(
        handles=list(handles),
        title="\n".join(map(drawable, lines)),
        loc="outside lower left",
        alignment="left",
        fontsize=SMALL,
        title_fontsize=SMALL,
        labelcolor=INK,
        frameon=False,
        ncols=min(3, len(handles)),
    )
    legend.get_title().set_color(MUTED)


def line(**style: Any) -> Any:
    """Return an entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def surface() -> dict[str, Any]:
    """Return what lies behind a figure."""
    return {"facecolor": SURFACE, "edgecolor": "none"}
