"""A study as plain data: what --json prints, and what every other form is made of."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.report.text import finite
from surgery.study.trial import Status

if TYPE_CHECKING:
    from surgery.study.collect import Study
    from surgery.study.statistics import Difference, Interval
    from surgery.study.summary import ArmSummary
    from surgery.study.trial import TrialResult


def rows(study: "Study") -> dict[str, Any]:
    """Describe a study: each arm, and what is wrong with its trials."""
    return {
        "metric": study.metric,
        "minimize": study.minimize,
        "failed_below": study.failed_below and {"value": study.failed_below.value, "why": study.failed_below.why},
        "arms": [_arm(study, arm) for arm in study.summaries],
        "notes": list(study.notes),
    }


def _arm(study: "Study", arm: "ArmSummary") -> dict[str, Any]:
    results = study.of(arm.name)
    counts = Counter(result.status for result in results)
    return {
        "name": arm.name,
        "n": arm.n,
        "mean": arm.mean,
        "std": arm.std,
        "median": arm.median,
        "best": arm.best,
        "worst": arm.worst,
        "failed": arm.failed,
        **_interval(arm.interval),
        "seconds": arm.seconds,
        "peak_memory": arm.peak_memory,
        "difference": _difference(arm),
        "verdict": _verdict(arm, results),
        "trials": {status.value: counts[status] for status in Status if counts[status]},
        "problems": [
            {"seed": result.trial.seed, "status": result.status.value, "why": result.why}
            for result in results
            if result.why
        ],
        "values": {str(seed): finite(value) for seed, value in arm.values.items()},
    }


def _verdict(arm: "ArmSummary", results: "list[TrialResult]") -> str:
    idle = next((result for result in results if result.status is Status.INACTIVE), None)
    if idle:
        return f"NO EFFECT: {idle.why}"
    return "nothing to compare yet" if results and arm.verdict and not arm.values else arm.verdict


def _difference(arm: "ArmSummary") -> dict[str, Any] | None:
    found: Difference | None = arm.difference
    if found is None:
        return None
    return {
        "n": found.n,
        "mean": found.mean,
        **_interval(found.interval),
        "p": found.p,
        "p_corrected": arm.p,
        "improvement": arm.improvement,
        "failed_p": arm.failed_p,
        "seconds_ratio": arm.slower,
        "memory_ratio": arm.larger,
        "seeds_needed": found.seeds_needed,
    }


def _interval(interval: "Interval | None") -> Mapping[str, float | None]:
    return {"low": interval.low, "high": interval.high} if interval else {"low": None, "high": None}
