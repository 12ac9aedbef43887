"""What is said of the arms: failed runs, verdicts in plain words, and what is left out of the figures."""

import math

import pytest

from surgery.study.summary import FailedBelow, Run, find_failed, summarize


def runs(*values: float) -> list[Run]:
    return [Run(seed, value, 10.0 + seed, 1000) for seed, value in enumerate(values)]


def summaries(plain: list[Run], **arms: list[Run]):
    found, _ = summarize({"plain": plain, **arms}, metric="eval_accuracy", minimize=False, failed_below=None)
    return {one.name: one for one in found}


def test_figures_of_an_arm() -> None:
    plain = summaries(runs(0.5, 0.7, 0.6))["plain"]
    assert (plain.n, plain.mean, plain.median, plain.best, plain.worst) == (3, pytest.approx(0.6), 0.6, 0.7, 0.5)
    assert plain.std == pytest.approx(0.1)
    assert (plain.seconds, plain.peak_memory, plain.verdict) == (11.0, 1000.0, "")
    assert (plain.difference, plain.failed) == (None, None)


def test_better_and_worse_in_plain_words() -> None:
    base = [0.60, 0.62, 0.61, 0.63, 0.60, 0.64, 0.62, 0.61]
    up = [0.012, 0.010, 0.015, 0.011, 0.013, 0.009, 0.014, 0.012]
    found = summaries(
        runs(*base),
        up=runs(*(b + d for b, d in zip(base, up, strict=True))),
        down=runs(*(b - d for b, d in zip(base, up, strict=True))),
    )
    assert found["up"].verdict == "better by 0.0120 (0.0104 to 0.0136)"
    assert found["down"].verdict == "worse by 0.0120 (0.0104 to 0.0136)"
    assert found["up"].p == pytest.approx(2 * 2 / 256)  # of two arms
    assert found["up"].improvement is not None
    assert found["up"].improvement > 0.7
    less, _ = summarize(
        {"plain": runs(*base), "up": runs(*(b + d for b, d in zip(base, up, strict=True)))},
        metric="eval_loss",
        minimize=True,
        failed_below=None,
    )
    assert less[1].verdict == "worse by 0.0120 (0.0104 to 0.0136)"
    assert (less[0].best, less[0].worst) == (0.60, 0.64)


def test_what_cannot_be_told_says_how_many_seeds_would() -> None:
    found = summaries(runs(0.50, 0.60, 0.55, 0.65, 0.58), arm=runs(0.55, 0.58, 0.61, 0.66, 0.55))["arm"]
    assert found.verdict == "cannot tell: about 63 more seeds would, if it stays at 0.0140"
    assert found.difference is not None
    assert found.difference.seeds_needed == 68  # (1.960 + 0.842)^2 * (0.0404 / 0.014)^2 + 1.960^2 / 2


def test_no_winner_by_the_interval_alone() -> None:
    found = summaries(runs(0.50, 0.60, 0.55, 0.65), arm=runs(0.52, 0.63, 0.57, 0.68))["arm"]
    assert found.difference is not None
    assert found.difference.interval is not None
    assert (found.difference.interval.low > 0, found.p) == (True, 2 / 16)
    assert found.verdict == "cannot tell: about 1 more seed would, if it stays at 0.0250"


def test_no_winner_below_three_seeds() -> None:
    found = summaries(runs(0.1, 0.2), arm=runs(0.9, 0.8))["arm"]
    assert found.verdict == "cannot tell: 2 seeds in common with plain, 3 at least"


def test_equal_arms_and_arms_without_pairs() -> None:
    same = runs(0.5, 0.6, 0.7)
    assert summaries(same, arm=same)["arm"].verdict == "cannot tell: no difference that any number of seeds would show"
    assert summaries(same, arm=[Run(9, 0.5)])["arm"].verdict == "no seeds in common with plain"
    assert summaries(same, arm=[])["arm"].verdict == "no seeds in common with plain"


def test_pairs_are_of_the_same_seed_and_of_finite_scores() -> None:
    plain = [Run(1, 0.5), Run(2, math.nan), Run(3, 0.7), Run(4, 0.1)]
    found = summaries(plain, arm=[Run(3, 0.8), Run(2, 0.9), Run(1, 0.7), Run(7, 0.0)])["arm"]
    assert found.difference is not None
    assert (found.difference.n, found.difference.mean) == (2, pytest.approx(0.15))


def test_nan_is_failed_and_in_no_mean() -> None:
    found, threshold = summarize(
        {"plain": runs(0.5, math.nan, 0.7, -math.inf, 1e308)}, metric="eval_spearman", minimize=False, failed_below=None
    )
    assert threshold == FailedBelow(0.0, "a model that always gives one answer has 0")
    assert (found[0].n, found[0].mean, found[0].failed) == (2, pytest.approx(0.6), 3)


@pytest.mark.parametrize(
    ("values", "metric", "minimize", "expected"),
    [
        ((0.0, 0.3, 0.4), "eval_matthews_correlation", False, 0.0),
        ((0.527, 0.527, 0.66, 0.68), "eval_accuracy", False, 0.527),
        ((0.527, 0.66, 0.68, 0.70), "eval_accuracy", False, None),
        ((0.61, 0.61, 0.62, 0.68), "eval_accuracy", False, None),
        ((0.7, 0.7, 0.7), "eval_accuracy", False, None),
        ((0.69, 0.69, 0.31, 0.33), "eval_loss", True, 0.69),
        ((), "eval_accuracy", False, None),
    ],
    ids=["correlation", "majority", "only one", "by chance", "all alike", "loss", "none"],
)
def test_failed_as_plain_shows(values, metric, minimize, expected) -> None:
    found = find_failed(runs(*values), metric, minimize=minimize)
    assert (found and found.value) == expected


def test_failed_as_asked_and_fishers_test_on_them() -> None:
    found, threshold = summarize(
        {"plain": runs(0.5, 0.5, 0.5, 0.7), "arm": runs(0.7, 0.7, 0.5, 0.8)},
        metric="eval_accuracy",
        minimize=False,
        failed_below=0.5,
    )
    assert threshold == FailedBelow(0.5, "as asked")
    assert [one.failed for one in found] == [3, 1]
    assert found[1].failed_p == pytest.approx(34 / 70)


def test_time_and_memory_are_over_plains() -> None:
    slow = [Run(seed, 0.5, 30.0, 2500) for seed in range(3)]
    found = summaries([Run(seed, 0.5, 20.0, 1000) for seed in range(3)], arm=slow)["arm"]
    assert (found.slower, found.larger) == (1.5, 2.5)
    assert summaries([Run(0, 0.5)], arm=[Run(0, 0.5)])["arm"].slower is None
