"""Statistics of a study: cases computed by hand, an implementation of its own for intervals, and simulated studies."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from surgery.cli import main
from surgery.study.statistics import compare_pairs, failed_p, holm, mean_interval, probability_of_improvement
from surgery.study.summary import Run, summarize


@pytest.mark.parametrize(
    ("d", "p"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),
        ([1.0] * 6, 2 / 64),
        ([3.0, -1.0, 2.0, 1.0, 4.0], 6 / 32),  # flipped: none, -1, 1, and the opposite of each
        ([0.0, 0.0, 0.0], 1.0),
        ([5.0], 1.0),
    ],
    ids=["three", "six", "five", "none", "one"],
)
def test_sign_flip_p_is_that_of_counting(d: list[float], p: float) -> None:
    found = compare_pairs([10.0] * len(d), [10.0 + x for x in d])
    assert found is not None
    assert (found.n, found.mean, found.p) == (len(d), pytest.approx(np.mean(d)), pytest.approx(p))


def test_sign_flip_p_counts_all_flips() -> None:
    d = np.random.default_rng(3).normal(0.4, 1, 11)
    flips = np.array(list(itertools.product((1, -1), repeat=len(d))))
    means = abs((flips * d).mean(1))
    found = compare_pairs(np.zeros(len(d)).tolist(), d.tolist())
    assert found is not None
    assert found.p == pytest.approx((means >= abs(d.mean()) - 1e-12).mean())


def test_sign_flip_p_of_many_pairs_is_sampled_and_repeats() -> None:
    d = np.random.default_rng(4).normal(0.5, 1, 40).tolist()
    first, second = (compare_pairs([0.0] * 40, d) for _ in range(2))
    assert first is not None
    assert first == second
    assert first.p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.003)


def test_no_pairs_say_nothing() -> None:
    assert compare_pairs([], []) is None


def test_holm_multiplies_by_what_is_left() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_fishers_tea_tasting() -> None:
    assert failed_p((3, 4), (1, 4)) == pytest.approx(34 / 70)  # Fisher, The Design of Experiments, 1935
    assert failed_p((8, 10), (0, 10)) == pytest.approx(2 * math.comb(10, 8) / math.comb(20, 8))


def test_improvement_counts_pairs_and_half_of_ties() -> None:
    assert probability_of_improvement([1, 2, 3], [2, 3, 4], minimize=False) == pytest.approx(7 / 9)
    assert probability_of_improvement([1, 2, 3], [2, 3, 4], minimize=True) == pytest.approx(2 / 9)


# -- intervals --------------------------------------------------------------------------------------------------------


def bca(data: np.ndarray, level: float, resamples: int = 200_000) -> tuple[float, float]:
    """Efron's BCa interval of a mean, from his paper's formulas."""
    rng = np.random.default_rng(99)
    n = len(data)
    means = data[rng.integers(0, n, (resamples, n))].mean(1)
    z0 = stats.norm.ppf((means < data.mean()).mean() + (means == data.mean()).mean() / 2)
    left_out = (data.sum() - data) / (n - 1)
    away = left_out.mean() - left_out
    a = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    z = stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    return tuple(np.quantile(means, stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))))


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_interval_is_bca_at_students_width(shape: str) -> None:
    rng = np.random.default_rng(5)
    data = rng.normal(0.7, 0.05, 6) if shape == "normal" else rng.exponential(1.0, 6)
    found = mean_interval(data.tolist())
    assert found is not None
    level = 1 - 2 * stats.norm.cdf(-math.sqrt(6 / 5) * stats.t.isf(0.025, 5))
    low, high = bca(data, level)
    width = high - low
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03 * width), pytest.approx(high, abs=0.03 * width))


def test_interval_of_equal_and_of_few_values() -> None:
    found = mean_interval([0.5] * 5)
    assert found is not None
    assert (found.low, found.high) == (0.5, 0.5)
    assert mean_interval([0.5, 0.6]) is None


def test_interval_repeats() -> None:
    assert mean_interval([0.1, 0.4, 0.2, 0.9]) == mean_interval([0.1, 0.4, 0.2, 0.9])


@pytest.mark.parametrize(("n", "least"), [(5, 0.89), (10, 0.93), (20, 0.93)])
def test_intervals_hold_95_percent(n: int, least: float) -> None:
    """Within three standard errors of 1,000 studies; of 5 values, whose resamples reach no farther than they, 91 %."""
    rng = np.random.default_rng(n)
    studies = 1000
    held = 0
    for data in rng.normal(0.0, 1.0, (studies, n)):
        found = mean_interval(data.tolist())
        assert found is not None
        held += found.low <= 0.0 <= found.high
    assert least <= held / studies <= 0.975


# -- simulated studies ------------------------------------------------------------------------------------------------


def test_at_most_5_percent_of_studies_of_equal_arms_find_a_difference() -> None:
    rng = np.random.default_rng(1)
    studies, arms, seeds = 1000, 8, 10
    found = 0
    for scores in rng.normal(0.7, 0.05, (studies, arms + 1, seeds)):
        p_values = [_p(scores[0] - arm) for arm in scores[1:]]
        found += min(holm(p_values)) < 0.05
    assert 0.01 <= found / studies <= 0.05


def _p(d: np.ndarray) -> float:
    """The sign-flip test with all flips of 10 pairs at once: the same as compare_pairs, which takes minutes here."""
    means = abs(_FLIPS @ d)
    return float((means >= abs(d.sum()) - 1e-12).mean())


_FLIPS = np.array(list(itertools.product((1, -1), repeat=10)))


def test_the_simulations_p_is_compare_pairs() -> None:
    for d in np.random.default_rng(2).normal(0.3, 1, (20, 10)):
        found = compare_pairs([0.0] * 10, d.tolist())
        assert found is not None
        assert _p(d) == pytest.approx(found.p)


@pytest.mark.sweep
def test_at_most_5_percent_of_whole_studies_of_equal_arms_name_a_winner() -> None:
    rng = np.random.default_rng(6)
    named = 0
    for scores in rng.normal(0.7, 0.05, (1000, 4, 10)):
        runs = {f"arm{i}": [Run(seed, value) for seed, value in enumerate(row)] for i, row in enumerate(scores)}
        summaries, _ = summarize(runs, metric="accuracy", minimize=False, failed_below=None)
        named += any(one.verdict.startswith(("better", "worse")) for one in summaries)
    assert named / 1000 <= 0.05


def test_seeds_needed_give_the_power_they_promise() -> None:
    rng = np.random.default_rng(7)
    pilot = rng.normal(0, 1, 400)
    pilot = 0.8 + (pilot - pilot.mean()) / pilot.std(ddof=1)  # mean 0.8, standard deviation 1, exactly
    found = compare_pairs([0.0] * 400, pilot.tolist())
    assert found is not None
    n = found.seeds_needed
    assert n is not None
    # Cohen, 1988, table 2.4.1: d 0.8, paired, two-sided 0.05, power 0.80 wants 15
    assert 14 <= n <= 16
    told = np.mean([stats.ttest_1samp(rng.normal(0.8, 1, n), 0).pvalue < 0.05 for _ in range(2000)])
    assert 0.76 <= told <= 0.86


def test_no_number_of_seeds_tells_what_is_equal() -> None:
    found = compare_pairs([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0])
    assert found is not None
    assert (found.mean, found.seeds_needed) == (0.0, None)


def test_missing_scipy_is_refused_before_anything_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.chdir(tmp_path)
    asked = ["-o", "study", "--seeds", "2", "--metric", "acc", "--arm", "mixout=1", "--", "python", "{seed}"]
    for words in (["study", *asked], ["study", "compare", "a", "b", "--metric", "acc"]):
        done = CliRunner().invoke(main, words)
        assert (done.exit_code, done.stderr) == (
            1,
            "error: surgery study: expected SciPy, got no such package. Install it with "
            "`pip install 'model-surgery[study]'`.\n",
        )
    assert not list(tmp_path.iterdir())
