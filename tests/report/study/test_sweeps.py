"""Figures of sweeps: curves, bands, dots and shares of failed runs are the data; axes, labels and curves by name."""

import pytest
from drawn import LAMS, PS, assert_apart, find, grid, only_sweep, sweep_of, texts_of
from matplotlib import rc_context
from studies import draw_scores, make_study, twelve_arms

from surgery.report.drawing import STYLE
from surgery.report.study.figures import draw_study
from surgery.report.study.runs import MOST_CURVES, sweeps_of
from surgery.study.collect import Study


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Study]:
    folder = tmp_path_factory.mktemp("studies")
    return {"twelve": twelve_arms(folder / "12"), "grid": grid(folder / "36")}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("noisytune", ("0.01", "0.011", "0.012", "0.3")),
        ("noisytune", tuple(f"{i / 1000}" for i in range(1, 41))),
        ("include", tuple(f"encoder.layer.{i}.attention" for i in range(9))),
    ],
    ids=["close", "many", "words"],
)
def test_labels_of_a_sweep_stay_apart(name, values, tmp_path):
    fixed = "" if name == "noisytune" else "mixout=0.7 "
    scores = {"plain": draw_scores(2)} | {f"{fixed}{name}={value}": draw_scores(2) for value in values}
    study = make_study(tmp_path / "s", scores, sweeps=[f"{fixed}{name}={','.join(values)}"])
    with rc_context(STYLE):
        assert_apart(only_sweep(study))


def test_curve_band_and_dots_of_a_sweep_are_the_data(studies):
    study = studies["twelve"]
    with rc_context(STYLE):
        figure = only_sweep(study)
    arms = {arm.name: arm for arm in study.summaries}
    swept = {lam: arms[f"noisytune={lam}"] for lam in (0.05, 0.1, 0.15, 0.3)}
    assert find(figure, "mean-0") == [(lam, arm.mean) for lam, arm in swept.items()]
    (band,) = (one for one in figure.axes[0].collections if one.get_gid() == "band-0")
    points = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices}
    assert points == {(lam, end) for lam, arm in swept.items() for end in (arm.interval.low, arm.interval.high)}
    for i, (lam, arm) in enumerate(swept.items()):
        drawn = find(figure, f"dots-0-{i}-0") + find(figure, f"dots-0-{i}-1")
        assert sorted(y for _, y in drawn) == sorted(arm.values.values())
        assert all(abs(x - lam) < 0.01 for x, _ in drawn)
        assert {y for _, y in find(figure, f"dots-0-{i}-1")} <= {study.failed_below.value}
    assert find(figure, "failed-0") == [(lam, arm.failed / 20) for lam, arm in swept.items()]
    assert {y for _, y in find(figure, "plain-failed")} == {3 / 20}
    assert {y for _, y in find(figure, "plain")} == {study.summaries[0].mean}


def test_sweep_over_two_names_has_a_curve_for_each_value_of_the_second(studies):
    study = studies["grid"]
    with rc_context(STYLE):
        figure = only_sweep(study)
    arms = {arm.name: arm for arm in study.summaries}
    for i, p in enumerate(PS[:MOST_CURVES]):
        assert find(figure, f"mean-{i}") == [(float(lam), arms[f"noisytune={lam} mixout={p}"].mean) for lam in LAMS]
    assert not find(figure, f"mean-{MOST_CURVES}")
    assert {f"mixout={p}" for p in PS[:MOST_CURVES]} <= set(texts_of(figure))
    assert any("not drawn, as too many: mixout=0.95" in text for text in texts_of(figure))


@pytest.mark.parametrize(
    ("values", "scale", "xs"),
    [
        (("0.3", "0.1", "0.2"), "linear", [0.1, 0.2, 0.3]),
        (("0.001", "0.01", "0.1"), "log", [0.001, 0.01, 0.1]),
        (("0.01", "0.3"), "linear", [0.01, 0.3]),
        (("0.2",), "linear", [0.2]),
    ],
    ids=["sorted", "log", "30 times", "one"],
)
def test_axis_of_a_sweep_is_of_numbers(values, scale, xs, tmp_path):
    with rc_context(STYLE):
        figure = only_sweep(sweep_of(tmp_path / "s", "noisytune", values))
        figure.canvas.draw()
    assert figure.axes[-1].get_xscale() == scale
    assert [x for x, _ in find(figure, "mean-0")] == xs
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == sorted(values, key=float)


def test_axis_of_a_sweep_over_words_has_them_in_their_order(tmp_path):
    scores = {"plain": draw_scores(3)} | {f"mixout=0.5 include={name}": draw_scores(3) for name in ("b", "a", "c")}
    study = make_study(tmp_path / "s", scores, sweeps=["mixout=0.5 include=b,a,c"])
    with rc_context(STYLE):
        figure = only_sweep(study)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["b", "a", "c"]
    assert figure.axes[-1].get_xlabel() == "include, with mixout=0.5"
    assert list(draw_study(study, ".svg")) == ["arms", "sweep-mixout+include"]


def test_two_sweeps_over_one_name_are_one_figure(tmp_path):
    scores = {name: draw_scores(3) for name in ("plain", "noisytune=0.1", "noisytune=0.3", "--noisytune=0.2")}
    study = make_study(tmp_path / "s", scores, sweeps=["noisytune=0.1,0.3", "--noisytune=0.2"])
    (sweep,) = sweeps_of(study)
    assert (sweep.name, sweep.labels) == ("noisytune", ("0.1", "0.2", "0.3"))
