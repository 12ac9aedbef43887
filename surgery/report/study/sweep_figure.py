"""A curve over the values of a sweep with its band, each run as a dot, and below it the share of runs that failed.

After figure 4 of the Mixout paper (arXiv:1909.11299).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.report.drawing import drawable, new_figure
from surgery.report.names import tell_apart
from surgery.report.study import dots
from surgery.report.study.colours import CURVES, INK, LINE, MUTED
from surgery.report.study.runs import Runs, Sweep, runs_of
from surgery.report.widths import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from surgery.study.collect import Study

_WIDTH, _HEIGHT, _PANEL = 8.0, 4.6, 1.1  # inches
_MARGIN = 0.06  # of the axis, beside the first and the last value
_JITTER = 0.014  # of the axis
_APART = 0.011  # of the axis, from curve to curve
_CHARACTER = 0.013  # of the axis that one of a tick's label takes
_LONGEST = 16  # characters of a label
_CURVE, _METRIC, _FIXED = 40, 22, 80  # characters of names


def sweep_figure(study: "Study", sweep: Sweep) -> "Figure":
    """Draw a sweep of a study."""
    plain = runs_of(study)[0]
    has_panel = study.failed_below is not None
    figure = new_figure(_WIDTH, _HEIGHT + _PANEL * has_panel)
    figure.set(**dots.surface())
    ratios = [4, 1] if has_panel else [1]
    upper, *panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for axes in (upper, *panels):
        dots.style_axes(axes)
    _set_axes((upper, *panels)[-1], sweep)
    _set_metric(upper, study, sweep, plain)
    _draw_plain(upper, plain)
    for curve, points in enumerate(sweep.curves.values()):
        _draw_curve(upper, sweep, points, curve, edge=float(study.minimize))
    for axes in panels:
        _draw_failed(axes, sweep, plain)
    threshold = dots.threshold_of(study, upper.get_ylim())
    if threshold is not None:
        upper.axhline(threshold, **dots.THRESHOLD, zorder=0.5, gid="threshold")
    dots.add_legend(figure, study, _legend(sweep, plain, has_threshold=threshold is not None), _notes(upper, sweep))
    return figure


def _set_axes(axes: "Axes", sweep: Sweep) -> None:
    """Place the values of the sweep as numbers where they are some, and label those that have room."""
    if sweep.is_log:
        axes.set_xscale("log")
    axes.set_xlim(sweep.at(-_MARGIN), sweep.at(1 + _MARGIN))
    ticks, taken = [], -1.0
    names = tell_apart(sweep.labels, _LONGEST)
    for label, x in zip(sweep.labels, sweep.xs, strict=True):
        room = _CHARACTER * len(names[label]) / 2
        at = sweep.share(x)
        if at - room >= taken:
            ticks.append((x, drawable(names[label])))
            taken = at + room + _CHARACTER
    axes.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(drawable(shorten(f"{sweep.name}, with {sweep.fixed}" if sweep.fixed else sweep.name, _FIXED)))


def _set_metric(axes: "Axes", study: "Study", sweep: Sweep, plain: Runs) -> None:
    drawn = [plain, *(runs for points in sweep.curves.values() for runs in points.values())]
    axes.set_ylim(dots.limit(drawn))
    axes.set_ylabel(dots.metric_label(study, _METRIC))
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)


def _draw_plain(axes: "Axes", plain: Runs) -> None:
    limits = axes.get_ylim()
    if plain.mean is not None:
        mean = dots.within(plain.mean, limits)
        axes.axhline(mean, **dots.PLAIN, gid="plain")
    if plain.interval:
        low, high = (dots.within(end, limits) for end in (plain.interval.low, plain.interval.high))
        axes.axhspan(low, high, color=MUTED, alpha=0.13, linewidth=0, gid="plain-band")


def _draw_curve(axes: "Axes", sweep: Sweep, points: Mapping[int, Runs], curve: int, *, edge: float) -> None:
    colour, shift = CURVES[curve], _shift(sweep, curve)
    known = {sweep.xs[i]: runs for i, runs in sorted(points.items())}
    for i, runs in sorted(points.items()):
        middle = sweep.share(sweep.xs[i]) + shift
        at = [sweep.at(middle + _JITTER * offset) for offset in dots.spread(runs.total)]
        _draw_runs(axes, runs, colour, at, edge=edge, gid=f"dots-{curve}-{i}")
    limits = axes.get_ylim()
    means = [(x, dots.within(runs.mean, limits)) for x, runs in known.items() if runs.mean is not None]
    bands = [(x, runs.interval) for x, runs in known.items() if runs.interval]
    if bands:
        lows, highs = (
            [dots.within(end, limits) for end in ends]
            for ends in zip(*((band.low, band.high) for _, band in bands), strict=True)
        )
        alpha = 0.2 if len(sweep.curves) == 1 else 0.08
        axes.fill_between(
            [x for x, _ in bands], lows, highs, color=colour, alpha=alpha, linewidth=0, gid=f"band-{curve}"
        )
    axes.plot([x for x, _ in means], [mean for _, mean in means], color=colour, **dots.MEAN, gid=f"mean-{curve}")


def _shift(sweep: Sweep, curve: int) -> float:
    """Return how far beside their value a curve's dots and stems lie, as a share of the axis."""
    return _APART * (curve - (len(sweep.curves) - 1) / 2)


def _draw_runs(axes: "Axes", runs: Runs, colour: str, xs: Sequence[float], *, edge: float, gid: str) -> None:
    limits = axes.get_ylim()
    for is_failed in (False, True):
        chosen = [i for i, failed in enumerate(runs.are_failed) if failed == is_failed]
        if chosen:  # an empty line that is not clipped takes room at the figure's corner
            ys = [dots.within(runs.values[i], limits) for i in chosen]
            style = dots.dots(colour, failed=is_failed)
            axes.plot([xs[i] for i in chosen], ys, **style, clip_on=False, gid=f"{gid}-{is_failed:d}")
    if runs.lost:
        axes.plot(xs[len(runs.values) :], [edge] * runs.lost, transform=axes.get_xaxis_transform(), **dots.LOST)


def _draw_failed(axes: "Axes", sweep: Sweep, plain: Runs) -> None:
    """Draw the share of failed runs as stems; plain's as a line."""
    highest = plain.failed_share or 0.0
    for curve, points in enumerate(sweep.curves.values()):
        shares = [(i, runs.failed_share) for i, runs in sorted(points.items()) if runs.failed_share is not None]
        xs = [sweep.at(sweep.share(sweep.xs[i]) + _shift(sweep, curve)) for i, _ in shares]
        ys = [share for _, share in shares]
        axes.vlines(xs, 0, ys, color=CURVES[curve], linewidth=2.5)
        style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5, "color": CURVES[curve]}
        axes.plot(xs, ys, **style, clip_on=False, gid=f"failed-{curve}")
        highest = max([highest, *ys])
    if plain.failed_share is not None:
        axes.axhline(plain.failed_share, **dots.PLAIN, gid="plain-failed")
    axes.set_ylim(0, 1.0 if highest > 0.5 else 0.5 if highest > 0.2 else 0.2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.locator_params(axis="y", nbins=3)
    axes.set_ylabel("failed")


def _legend(sweep: Sweep, plain: Runs, *, has_threshold: bool) -> list["Line2D"]:
    names = tell_apart(list(sweep.curves), _CURVE)
    curves = [
        dots.entry(names[name] or "mean, 95 % interval", color=CURVES[i], **dots.MEAN)
        for i, name in enumerate(sweep.curves)
    ]
    drawn = [runs for points in sweep.curves.values() for runs in points.values()]
    colour = CURVES[0] if len(curves) == 1 else INK
    runs = dots.run_entries(drawn, colour, has_threshold=has_threshold)
    return [*curves, dots.entry(f"{plain.name}, with its interval", **dots.PLAIN), *runs]


def _notes(axes: "Axes", sweep: Sweep) -> list[str]:
    """Say what curves are, and what is not drawn."""
    drawn = [(i, name, runs) for name, points in sweep.curves.items() for i, runs in points.items()]
    notes = ["curves and bands: means and their 95 % intervals"] if len(sweep.curves) > 1 else []
    notes += dots.outside([runs for _, _, runs in drawn], axes.get_ylim())
    notes += [
        f"{sweep.name}={sweep.labels[i]} {name}".strip() + f": {runs.state}" for i, name, runs in drawn if runs.state
    ]
    return notes + ([f"not drawn, as too many: {_some(sweep.left_out)}"] if sweep.left_out else [])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
