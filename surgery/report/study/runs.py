"""What figures draw of a study: the runs of each arm, and the arms that a sweep made as curves over its values."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.report.text import finite
from surgery.report.widths import shorten
from surgery.study.summary import figure, is_usable
from surgery.study.trial import Status

if TYPE_CHECKING:
    from surgery.study.collect import Study
    from surgery.study.statistics import Interval

MOST_CURVES = 6
_LOG_FROM = 30  # the largest of a sweep's values over its smallest


@dataclass(frozen=True)
class Runs:
    """The runs of an arm.

    Args:
        name: of the arm.
        values: that are finite.
        are_failed: for each of them, whether the run has failed.
        lost: how many have no finite value.
        mean, interval: of the values.
        failed: how many runs have failed, `lost` among them; None where that is not known.
        state: why there is nothing to draw, in words; none where there is.
    """

    name: str
    values: tuple[float, ...]
    are_failed: tuple[bool, ...]
    lost: int
    mean: float | None
    interval: "Interval | None"
    failed: int | None
    state: str

    @property
    def total(self) -> int:
        return len(self.values) + self.lost

    @property
    def failed_share(self) -> float | None:
        """Failed runs over all of them."""
        return None if self.failed is None or not self.total else self.failed / self.total


def runs_of(study: "Study") -> list[Runs]:
    """Return the runs of all arms, plain first."""
    found = []
    for arm in study.summaries:
        values = tuple(value for value in arm.values.values() if is_usable(value))
        are_failed = tuple(map(study.is_failed, values))
        lost = len(arm.values) - len(values)
        state = "" if arm.values else _state(study, arm.name)
        found.append(
            Runs(arm.name, values, are_failed, lost, finite(arm.mean), _known(arm.interval), arm.failed, state)
        )
    return found


def _known(interval: "Interval | None") -> "Interval | None":
    """Leave out an interval that is beyond what floats hold, as runs that diverge may have."""
    return interval if interval and math.isfinite(interval.high - interval.low) else None


def _state(study: "Study", arm: str) -> str:
    """Say why an arm has no runs."""
    counts = Counter(result.status for result in study.of(arm))
    if counts[Status.INACTIVE]:
        return "no effect: not compared"
    states = [f"{counts[status]} {status.value}" for status in Status if counts[status]]
    return ", ".join(states) or "no runs"


def failed_rule(study: "Study", room: int | None = None) -> str:
    """Say which runs have failed, with the metric's name in so many characters at most."""
    rule = study.failed_below
    if rule is None:
        return "failed: not known, as no runs of plain share a worst score"
    metric = study.metric if room is None else shorten(study.metric, room)
    return f"failed: {metric} of {figure(rule.value)} or {'more' if study.minimize else 'less'} ({rule.why})"


@dataclass(frozen=True)
class Sweep:
    """Arms over the values of a flag.

    Args:
        name: of the flag.
        fixed: what else all of them have, as name=value.
        labels: its values, as the user wrote them.
        xs: where these lie: the numbers themselves, or 0, 1, ... where not all are numbers.
        is_log: they span more than a linear axis shows.
        is_numeric: they are numbers.
        curves: by what else tells them apart, as name=value; of each, the runs by place in `labels`.
        left_out: curves that are too many.
        flags: all that it gives its arms.
    """

    name: str
    fixed: str
    labels: tuple[str, ...]
    xs: tuple[float, ...]
    is_log: bool
    is_numeric: bool
    curves: Mapping[str, Mapping[int, Runs]]
    left_out: tuple[str, ...]
    flags: tuple[str, ...]

    def share(self, x: float) -> float:
        """Return how far along the axis a value lies: 0 at the first, 1 at the last."""
        first, last = self.xs[0], self.xs[-1]
        if first == last:
            return 0.5
        return math.log(x / first) / math.log(last / first) if self.is_log else (x - first) / (last - first)

    def at(self, share: float) -> float:
        """Return the value that lies so far along the axis."""
        first, last = self.xs[0], self.xs[-1]
        if first == last:
            return first + (abs(first) or 1.0) * (share - 0.5)
        return float(first * (last / first) ** share) if self.is_log else first + (last - first) * share

    @property
    def file_name(self) -> str:
        """What tells its figure from those of other sweeps."""
        return "+".join(self.flags)


def sweeps_of(study: "Study") -> list[Sweep]:
    """Return the sweeps of a study; those over the same flags are one."""
    runs = {one.name: one for one in runs_of(study)}
    groups: dict[frozenset[str], list[tuple[Mapping[str, str], Runs]]] = {}
    for arm in study.arms:
        if arm.swept and arm.name in runs:
            swept = {name.removeprefix("--").replace("_", "-"): value for name, value in arm.swept.items()}
            groups.setdefault(frozenset(swept), []).append((swept, runs[arm.name]))
    return [_make_sweep(group) for group in groups.values()]


def _make_sweep(group: Sequence[tuple[Mapping[str, str], Runs]]) -> Sweep:
    flags = tuple(group[0][0])
    varied = [flag for flag in flags if len({swept[flag] for swept, _ in group}) > 1]
    x = (varied or flags)[0]
    labels, xs, is_numeric = _axis(dict.fromkeys(swept[x] for swept, _ in group))
    curves: dict[str, dict[int, Runs]] = {}
    for swept, runs in group:
        other = " ".join(f"{flag}={swept[flag]}" for flag in varied if flag != x)
        curves.setdefault(other, {})[labels.index(swept[x])] = runs
    shown = dict(list(curves.items())[:MOST_CURVES])
    return Sweep(
        x,
        " ".join(f"{flag}={group[0][0][flag]}" for flag in flags if flag != x and flag not in varied),
        labels,
        xs,
        is_numeric and min(xs) > 0 and max(xs) / min(xs) > _LOG_FROM,
        is_numeric,
        shown,
        tuple(curves)[MOST_CURVES:],
        flags,
    )


def _axis(values: Mapping[str, None]) -> tuple[tuple[str, ...], tuple[float, ...], bool]:
    """Return the values in order, where they lie, and whether they are numbers."""
    numbers = {value: _number(value) for value in values}
    known = {value: number for value, number in numbers.items() if number is not None}
    if len(known) < len(numbers):
        return tuple(values), tuple(map(float, range(len(values)))), False
    ordered = sorted(known, key=lambda value: known[value])
    return tuple(ordered), tuple(known[value] for value in ordered), True


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
