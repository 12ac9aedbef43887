"""What both kinds of a study's figures draw: a dot for each run, the mean with its interval, and what they mean."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.report.drawing import drawable
from surgery.report.study.colours import ALARM, INK, LINE, MUTED, SURFACE
from surgery.report.study.runs import Runs, failed_rule
from surgery.report.widths import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from surgery.study.collect import Study

SMALL = 8
_GOLDEN = 0.6180339887498949
_METRIC = 40  # characters of its name
_LEGEND_LINE = 110  # characters that fit below a figure
_HIGHEST = 1e100  # of what is drawn as it is: matplotlib overflows beyond
_WIDEST = 40  # times what the middle half of the runs spans: an axis of more shows nothing but the outermost


def spread(n: int) -> list[float]:
    """Return n offsets in (-0.5, 0.5) that keep neighbours apart: multiples of the golden ratio, always the same."""
    return [(i + 0.5) * _GOLDEN % 1 - 0.5 for i in range(n)]


def dots(colour: str, *, failed: bool) -> dict[str, Any]:
    """Return how runs are drawn: those that have failed are hollow and in the colour of an alarm."""
    common = {"linestyle": "none", "marker": "o", "markersize": 4.2, "color": colour}
    if failed:
        return common | {"markerfacecolor": "none", "markeredgecolor": ALARM}
    return common | {"markeredgecolor": "none", "alpha": 0.65}


LOST: dict[str, Any] = {"linestyle": "none", "marker": "x", "color": ALARM, "markersize": 5, "clip_on": False}
"""How runs without a finite value are drawn, at the edge."""


PLAIN: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (5, 3))}
THRESHOLD: dict[str, Any] = {"color": ALARM, "linewidth": 1, "linestyle": (0, (1, 2))}
MEAN: dict[str, Any] = {"marker": "D", "markersize": 4.5, "linewidth": 1.6}


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


def limit(runs: Sequence[Runs]) -> tuple[float, float]:
    """Return where an axis of the metric begins and ends: within it lies all that is drawn, but what is far outside."""
    import numpy as np

    values = [value for one in runs for value in one.values]
    ends = [end for one in runs if one.interval for end in (one.interval.low, one.interval.high)]
    if not values:
        return 0.0, 1.0
    known = np.clip([*values, *ends], -_HIGHEST, _HIGHEST)
    low, high = float(known.min()), float(known.max())
    first, third = np.quantile(known[: len(values)], (0.25, 0.75)).tolist()
    far = _WIDEST * (third - first)
    if far and high - low > far:
        low, high = max(low, first - far / 4), min(high, third + far / 4)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def within(value: float, limits: tuple[float, float]) -> float:
    """Return where a figure is drawn: at the edge, if it lies beyond it."""
    return min(max(value, limits[0]), limits[1])


def outside(runs: Sequence[Runs], limits: tuple[float, float]) -> list[str]:
    """Say how much is drawn at the edge."""
    values = [value for one in runs for value in one.values]
    kinds = {"run": values, "mean": [one.mean for one in runs if one.mean is not None]}
    counts = {name: sum(bool(within(value, limits) != value) for value in known) for name, known in kinds.items()}
    told = [f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n]
    return [f"far outside, and drawn at the edge: {' and '.join(told)}"] if told else []


def threshold_of(study: "Study", limits: tuple[float, float]) -> float | None:
    """Return where the line of failed runs is drawn, if there is one in sight."""
    rule = study.failed_below
    return rule.value if rule and limits[0] <= rule.value <= limits[1] else None


def add_legend(figure: "Figure", study: "Study", entries: "Sequence[Line2D]", notes: Sequence[str]) -> None:
    """Say below a figure what is drawn, which runs have failed, and what else must be known."""
    import textwrap

    lines = [wrapped for text in (failed_rule(study, _METRIC), *notes) for wrapped in textwrap.wrap(text, _LEGEND_LINE)]
    legend = figure.legend(
        handles=list(entries),
        title="\n".join(map(drawable, lines)),
        loc="outside lower left",
        alignment="left",
        fontsize=SMALL,
        title_fontsize=SMALL,
        labelcolor=INK,
        frameon=False,
        ncols=min(3, len(entries)),
    )
    legend.get_title().set_color(MUTED)


def run_entries(runs: Sequence[Runs], colour: str, *, has_threshold: bool) -> list["Line2D"]:
    """Return the entries of a legend for runs, of those kinds that are drawn."""
    entries = [entry("a run", **dots(colour, failed=False))]
    if any(any(one.are_failed) for one in runs):
        entries.append(entry("a failed run", **dots(colour, failed=True)))
    if has_threshold:
        entries.append(entry("from here on failed", **THRESHOLD))
    if any(one.lost for one in runs):
        entries.append(entry("no finite value", **LOST))
    return entries


def entry(label: str, **style: Any) -> "Line2D":
    """Return an entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=drawable(label), **style)


def surface() -> dict[str, Any]:
    """Return what lies behind a figure."""
    return {"facecolor": SURFACE, "edgecolor": "none"}
