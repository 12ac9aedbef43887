"""All that a study says: a summary of each arm, its difference from plain, and one line in plain words."""

import statistics as basic
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from surgery.study.arms import PLAIN
from surgery.study.statistics import (
    Difference,
    Interval,
    compare_pairs,
    failed_p,
    holm,
    mean_interval,
    probability_of_improvement,
)

LEAST_SEEDS = 3
"""Below which no winner is named."""
_SURE = 0.05
_OF_NOTHING = ("matthews", "mcc", "kappa", "spearman", "pearson", "kendall")
"""Metrics of which 0 is what a model has that always gives one answer."""


_LARGEST = 1e150
"""Of a metric that is worth a mean: the square of a larger one is infinite."""


def is_usable(value: float) -> bool:
    """Tell whether a metric has a place in a mean: NaN, Inf and what a run that has diverged writes have none."""
    return abs(value) <= _LARGEST


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        seed: that it shares with one run of each other arm; or a name, of runs that somebody else made.
        value: of the metric; NaN where the script says so.
        seconds, peak_memory: as Result has them; None where they are not known.
    """

    seed: int | str
    value: float
    seconds: float | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class FailedBelow:
    """From where on a run has failed.

    Args:
        value: a run whose metric is this or worse has.
        why: where it comes from.
    """

    value: float
    why: str

    def covers(self, value: float, *, minimize: bool) -> bool:
        """Tell whether a run with this score has failed; NaN and Inf have."""
        sign = -1 if minimize else 1
        return not is_usable(value) or sign * value <= sign * self.value


@dataclass(frozen=True)
class ArmSummary:
    """What the runs of an arm say. Figures are over those whose metric is finite.

    Args:
        name: of the arm.
        values: of all runs, by seed.
        n: finite ones.
        mean, std, median, best, worst: of these; std of n - 1; None if there are too few.
        interval: 95 % of the mean.
        failed: how many runs have failed, those without a finite metric among them; None where that is not known.
        seconds, peak_memory: medians.
        difference: from plain; None for plain, and where no seeds are shared.
        p: of that difference, corrected for the number of arms (Holm).
        improvement: probability that a run is better than one of plain.
        failed_p: Fisher's exact test on failed runs.
        slower, larger: seconds and memory over plain's.
        verdict: one line in plain words.
    """

    name: str
    values: Mapping[int | str, float]
    n: int
    mean: float | None
    std: float | None
    median: float | None
    best: float | None
    worst: float | None
    interval: Interval | None
    failed: int | None
    seconds: float | None
    peak_memory: float | None
    difference: Difference | None = None
    p: float | None = None
    improvement: float | None = None
    failed_p: float | None = None
    slower: float | None = None
    larger: float | None = None
    verdict: str = ""


def summarize(
    runs: Mapping[str, Sequence[Run]], *, metric: str, minimize: bool, failed_below: float | None
) -> tuple[tuple[ArmSummary, ...], FailedBelow | None]:
    """Summarize the runs of each arm, and compare each with the first, which is plain.

    Args:
        runs: by the name of the arm, plain first.
        failed_below: as in Plan.
    """
    base, *_ = runs
    threshold = find_failed(runs[base], metric, minimize=minimize, asked=failed_below)
    alone = {name: _alone(name, found, threshold, minimize=minimize) for name, found in runs.items()}
    others = [name for name in runs if name != base]
    differences = {name: _difference(runs[base], runs[name], len(others)) for name in others}
    tested = [name for name in others if differences[name]]
    corrected = dict(zip(tested, holm([found.p for name in tested if (found := differences[name])]), strict=True))
    compared = [
        _against(alone[base], alone[name], differences[name], corrected.get(name), minimize=minimize) for name in others
    ]
    return (alone[base], *compared), threshold


def find_failed(plain: Sequence[Run], metric: str, *, minimize: bool, asked: float | None = None) -> FailedBelow | None:
    """Say from where on a run has failed: as asked, or where a model always gives one answer.

    Of correlations that is 0. Of other metrics it is a value that several plain runs share to the last digit, the
    worst of all and apart from the others, if there is one.
    """
    if asked is not None:
        return FailedBelow(asked, "as asked")
    if not minimize and any(name in metric.lower() for name in _OF_NOTHING):
        return FailedBelow(0.0, "a model that always gives one answer has 0")
    values = sorted((run.value for run in plain if is_usable(run.value)), reverse=minimize)
    counts = Counter(values)
    others = [value for value in values if value != values[0]] if values else []
    if not others or counts[values[0]] < 2:
        return None
    gap, spread = abs(others[0] - values[0]), abs(others[-1] - others[0])
    if gap <= spread / 2:  # shared by chance: scores of few examples are coarse
        return None
    return FailedBelow(values[0], f"{counts[values[0]]} runs of {PLAIN} have exactly this")


def _alone(name: str, runs: Sequence[Run], threshold: FailedBelow | None, *, minimize: bool) -> ArmSummary:
    values = [run.value for run in runs if is_usable(run.value)]
    low, high = (min(values), max(values)) if values else (None, None)
    failed = sum(threshold.covers(run.value, minimize=minimize) for run in runs) if threshold else None
    return ArmSummary(
        name,
        {run.seed: run.value for run in runs},
        len(values),
        basic.fmean(values) if values else None,
        basic.stdev(values) if len(values) > 1 else None,
        basic.median(values) if values else None,
        low if minimize else high,
        high if minimize else low,
        mean_interval(values),
        failed,
        _median([run.seconds for run in runs]),
        _median([run.peak_memory for run in runs]),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(basic.median(known)) if known else None


def _difference(plain: Sequence[Run], arm: Sequence[Run], tests: int) -> Difference | None:
    before = {run.seed: run.value for run in plain if is_usable(run.value)}
    pairs = [(before[run.seed], run.value) for run in arm if run.seed in before and is_usable(run.value)]
    return compare_pairs(*zip(*pairs, strict=True), tests=tests) if pairs else None


def _against(
    plain: ArmSummary, arm: ArmSummary, difference: Difference | None, p: float | None, *, minimize: bool
) -> ArmSummary:
    both = [[value for value in one.values.values() if is_usable(value)] for one in (plain, arm)]
    totals = [(one.failed, len(one.values)) for one in (plain, arm)]
    known = [(failed, total) for failed, total in totals if failed is not None and total]
    return replace(
        arm,
        difference=difference,
        p=p,
        improvement=probability_of_improvement(*both, minimize=minimize) if all(both) else None,
        failed_p=failed_p(*known) if len(known) == 2 else None,
        slower=arm.seconds / plain.seconds if arm.seconds and plain.seconds else None,
        larger=arm.peak_memory / plain.peak_memory if arm.peak_memory and plain.peak_memory else None,
        verdict=_verdict(difference, p, minimize=minimize),
    )


def _verdict(difference: Difference | None, p: float | None, *, minimize: bool) -> str:
    if difference is None or p is None:
        return "no seeds in common with plain"
    interval = difference.interval
    if difference.n < LEAST_SEEDS or interval is None:
        return (
            f"cannot tell: {difference.n} seed{'s' * (difference.n != 1)} in common with plain, {LEAST_SEEDS} at least"
        )
    low, high = sorted((abs(interval.low), abs(interval.high)))
    size = f"{figure(abs(difference.mean))} ({figure(low)} to {figure(high)})"
    if p < _SURE and interval.low * interval.high > 0:
        return f"{'better' if (difference.mean < 0) == minimize else 'worse'} by {size}"
    if difference.seeds_needed is None:
        return "cannot tell: no difference that any number of seeds would show"
    more = max(difference.seeds_needed - difference.n, 1)
    return f"cannot tell: about {more} more seed{'s' * (more != 1)} would, if it stays at {figure(difference.mean)}"


def figure(value: float) -> str:
    """Write a figure of a metric in three digits."""
    return f"{value:#.3g}".rstrip(".") if 1e-4 <= abs(value) < 1e4 else f"{value:.3g}"
