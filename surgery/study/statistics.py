"""What scores of several runs say: bootstrap intervals, paired permutation tests, Holm's correction, Fisher's test.

SciPy does the statistics. Random numbers are seeded, so that the same scores always give the same figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.errors import SettingError

RESAMPLES = 9999
LEVEL = 0.95
POWER = 0.8
_SEED = 20200124
_MOST_SEEDS = 10_000


def check_scipy() -> None:
    """Refuse to begin what could not be judged in the end.

    Raises:
        SettingError: SciPy is not installed.
    """
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise SettingError(
            "surgery study: expected SciPy, got no such package. Install it with `pip install 'model-surgery[study]'`."
        ) from error


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Scores of an arm against those of plain, pair by pair over the seeds that both have.

    Args:
        n: pairs.
        mean: of arm - plain.
        interval: of that mean, 95 %; None of fewer than 3 pairs.
        p: of the sign-flip permutation test, two-sided: as often the mean would be as far from 0, were the arms equal.
        seeds_needed: how many pairs would tell a difference of this mean and spread from 0, in 4 of 5 studies; None if
            the mean is 0, or if it were more than 10,000.
    """

    n: int
    mean: float
    interval: Interval | None
    p: float
    seeds_needed: int | None


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the 95 % interval of a mean; None for fewer than 3 values.

    The BCa bootstrap (Efron, 1987), at the level at which a bootstrap's interval of few values is as wide as Student's
    (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 5.3). It holds 95 % from 10 values on, and
    91 % of 5, whose resamples reach no farther than they do.
    """
    from scipy import stats

    data = np.asarray(values, float)
    n = len(data)
    if n < 3:
        return None
    if np.ptp(data) == 0:
        return Interval(float(data[0]), float(data[0]))
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.isf((1 - LEVEL) / 2, n - 1))
    found = stats.bootstrap(
        (data,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * float(tail),
        method="BCa",
        rng=np.random.default_rng(_SEED),
        vectorized=True,
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def compare_pairs(plain: Sequence[float], arm: Sequence[float], *, tests: int = 1) -> Difference | None:
    """Compare scores of the same seeds; None if there are none.

    Args:
        tests: how many arms are compared with plain, for `seeds_needed`.
    """
    from scipy import stats

    d = np.asarray(arm, float) - np.asarray(plain, float)
    if not len(d):
        return None
    p = 1.0
    if np.any(d) and len(d) > 1:
        rng = np.random.default_rng(_SEED)
        tested = stats.permutation_test(
            (d,), _mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True, rng=rng
        )
        p = float(tested.pvalue)
    return Difference(len(d), float(d.mean()), mean_interval(d.tolist()), p, _seeds_needed(d, tests))


def _mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    found: np.ndarray = np.mean(values, axis=axis)
    return found


def _seeds_needed(d: np.ndarray, tests: int) -> int | None:
    """Return at how many pairs a t-test at 5 % / tests, two-sided, would find this mean and spread in 4 of 5 studies.

    The normal approximation of its power (Cohen, 1988, chapter 2).
    """
    from scipy import stats

    spread, mean = float(d.std(ddof=1)) if len(d) > 1 else math.nan, abs(float(d.mean()))
    if not mean or not spread > 0:
        return None
    z = stats.norm.isf((1 - LEVEL) / 2 / tests) + stats.norm.isf(1 - POWER)
    n = (z * spread / mean) ** 2 + stats.norm.isf((1 - LEVEL) / 2 / tests) ** 2 / 2
    return math.ceil(n) if n <= _MOST_SEEDS else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def probability_of_improvement(plain: Sequence[float], arm: Sequence[float], *, minimize: bool) -> float:
    """Return the share of all pairs in which the arm's run is better than plain's, ties half (Agarwal et al., 2021)."""
    a, b = np.asarray(arm, float)[:, None], np.asarray(plain, float)[None, :]
    better = (a < b) if minimize else (a > b)
    return float((better + 0.5 * (a == b)).mean())


def failed_p(plain: tuple[int, int], arm: tuple[int, int]) -> float:
    """Return the p of Fisher's exact test, two-sided, on failed runs and all runs of plain and of an arm."""
    from scipy import stats

    table = [[failed, total - failed] for failed, total in (plain, arm)]
    return float(stats.fisher_exact(table).pvalue)
