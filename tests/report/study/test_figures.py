"""Figures of a study: what is drawn is the data, and all texts stay apart, of 2, 12 and 36 arms."""

import math
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
from click.testing import CliRunner
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from studies import draw_scores, make_study, twelve_arms, two_arms

from surgery.cli import main
from surgery.report.drawing import STYLE
from surgery.report.study import dots
from surgery.report.study.arms_figure import arms_figure
from surgery.report.study.figures import draw_study, for_page
from surgery.report.study.runs import MOST_CURVES, sweeps_of
from surgery.report.study.sweep_figure import sweep_figure
from surgery.study.collect import Study
from surgery.study.others import compare_runs
from surgery.study.trial import Status

LAMS, PS = ("0.0001", "0.0005", "0.001", "0.01", "0.1"), ("0.1", "0.3", "0.5", "0.7", "0.8", "0.9", "0.95")


def grid(folder: Path) -> Study:
    """Return 36 arms of a sweep over two names, one curve of which is one too many."""
    scores = {"plain": draw_scores(4, failed=0.5, seed=3)}
    for i, lam in enumerate(LAMS):
        scores |= {f"noisytune={lam} mixout={p}": draw_scores(4, failed=0.1, seed=10 * i) for p in PS}
    return make_study(folder, scores, sweeps=[f"noisytune={','.join(LAMS)} mixout={','.join(PS)}"], failed_below=0.6)


def sweep_of(folder: Path, name: str, values: Sequence[str], **study: object) -> Study:
    scores = {"plain": draw_scores(5)} | {f"{name}={value}": draw_scores(5, seed=i) for i, value in enumerate(values)}
    return make_study(folder, scores, sweeps=[f"{name}={','.join(values)}"], **study)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Study]:
    folder = tmp_path_factory.mktemp("studies")
    return {"two": two_arms(folder / "2"), "twelve": twelve_arms(folder / "12"), "grid": grid(folder / "36")}


def all_figures(study: Study) -> list[Figure]:
    return [arms_figure(study), *(sweep_figure(study, one) for one in sweeps_of(study))]


def only_sweep(study: Study) -> Figure:
    (sweep,) = sweeps_of(study)
    return sweep_figure(study, sweep)


def find(figure: Figure, gid: str) -> list[tuple[float, float]]:
    """Return the points of what is drawn under an id; none where nothing is."""
    lines = [line for axes in figure.axes for line in axes.lines if line.get_gid() == gid]
    return [tuple(map(float, point)) for line in lines for point in line.get_xydata()]


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]


# -- all figures ------------------------------------------------------------------------------------------------------


def assert_apart(figure: Figure) -> None:
    """Assert that the texts of a figure are within it, large enough to read, and do not overlap."""
    figure.canvas.draw()
    hidden = set()  # labels of ticks beyond the ends of an axis
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        hidden |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = figure.findobj(Text)
    found = [text for text in texts if text.get_text().strip() and text.get_visible() and text not in hidden]
    boxes = {f"{i} {text.get_text()}": text.get_window_extent() for i, text in enumerate(found)}
    for text, box in boxes.items():
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    overlapping = [(a, b) for (a, one), (b, other) in combinations(boxes.items(), 2) if one.overlaps(other)]
    assert not overlapping
    assert min(text.get_fontsize() for text in found) >= 7


@pytest.mark.parametrize("name", ["two", "twelve", "grid"])
def test_texts_of_a_figure_are_within_it_and_apart(name, studies):
    with rc_context(STYLE):
        for figure in all_figures(studies[name]):
            assert_apart(figure)


def test_texts_stay_apart_however_long_they_are(tmp_path):
    long = f"rdrop=1 include={'encoder.layer.' * 30}attention"
    scores = {"plain": draw_scores(3), long: [Status.INACTIVE]}
    scores |= {f"noisytune={lam} {long}": draw_scores(3) for lam in (0.1, 0.2)}
    sweep = f"noisytune=0.1,0.2 {long}"
    study = make_study(tmp_path / "s", scores, sweeps=[sweep], metric="m" * 60, failed_below=0.1)
    with rc_context(STYLE):
        figures = all_figures(study)
        for figure in figures:
            assert_apart(figure)
    assert len(figures) == 2


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


def test_most_of_a_figure_is_what_it_shows(studies):
    with rc_context(STYLE):
        for name, least in (("two", 0.5), ("twelve", 0.75)):
            figure = arms_figure(studies[name])
            figure.canvas.draw()
            place = figure.axes[0].get_position()
            assert place.height > least
            assert place.width > 0.55


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF-"), (".svg", b"<?xml")])
def test_same_study_gives_the_same_bytes(suffix, magic, studies):
    first, second = (draw_study(studies["twelve"], suffix) for _ in range(2))
    assert first == second
    assert list(first) == ["arms", "sweep-noisytune"]
    assert all(data.startswith(magic) for data in first.values())


# -- arms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", "twelve", "grid"])
def test_each_run_is_a_dot_and_failed_ones_are_others(name, studies):
    study = studies[name]
    with rc_context(STYLE):
        figure = arms_figure(study)
    for row, arm in enumerate(study.summaries):
        finite = [value for value in arm.values.values() if math.isfinite(value)]
        for is_failed in (False, True):
            drawn = find(figure, f"dots-{row}-{is_failed:d}")
            assert sorted(x for x, _ in drawn) == sorted(v for v in finite if study.is_failed(v) == is_failed)
            assert all(abs(y - row) < 0.5 for _, y in drawn)


def test_mean_interval_and_lines_are_those_of_the_summary(studies):
    study = studies["twelve"]
    with rc_context(STYLE):
        figure = arms_figure(study)
    for row, arm in enumerate(study.summaries):
        assert [x for x, _ in find(figure, f"mean-{row}")] == ([] if arm.mean is None else [arm.mean])
        ends = [arm.interval.low, arm.interval.high] if arm.interval else []
        assert [x for x, _ in find(figure, f"interval-{row}")] == ends
    assert {x for x, _ in find(figure, "plain")} == {study.summaries[0].mean}
    assert {x for x, _ in find(figure, "threshold")} == {study.failed_below.value}


def test_arms_without_runs_are_named_and_say_why(studies):
    with rc_context(STYLE):
        figure = arms_figure(studies["twelve"])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(set(labels)) == 12
    assert labels[:2] == ["plain", "mixout=0.7"]
    assert {"no effect: not compared", "20 not run"} <= set(texts_of(figure))


def test_n_and_failed_runs_stand_beside_each_arm(studies):
    with rc_context(STYLE):
        texts = texts_of(arms_figure(studies["twelve"]))
    assert texts.count("0") == 2
    assert {"n", "failed", "3/20", "2/20", "4/18", "19"} <= set(texts)
    assert "failed: eval_accuracy of 0.527 or less (3 runs of plain have exactly this)" in texts
    assert not any(text.endswith("/0") for text in texts)


def test_failed_runs_are_not_spoken_of_where_they_are_not_known(tmp_path):
    study = sweep_of(tmp_path / "s", "noisytune", ["0.1", "0.2"])
    with rc_context(STYLE):
        arms, sweep = all_figures(study)
    unknown = "failed: not known, as no runs of plain share a worst score"
    assert [text for text in texts_of(arms) if "failed" in text] == [unknown]
    assert [text for text in texts_of(sweep) if "failed" in text] == [unknown]
    assert len(sweep.axes) == 1


@pytest.mark.parametrize(("minimize", "edge"), [(False, 0), (True, 1)])
def test_runs_without_a_finite_value_are_crosses_at_the_worse_edge(minimize, edge, tmp_path):
    scores = {"plain": [0.1, 0.2, 0.3], "rdrop=1": [math.nan, math.inf, 0.2]}
    with rc_context(STYLE):
        figure = arms_figure(make_study(tmp_path / "s", scores, minimize=minimize))
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[edge, edge]]
    assert "no finite value" in texts_of(figure)


def test_runs_far_outside_do_not_hide_the_others(tmp_path):
    scores = {"plain": [0.3, 0.31, 0.32, 0.33], "rdrop=1": [0.29, 0.3, 0.31, 1e9]}
    with rc_context(STYLE):
        figure = arms_figure(make_study(tmp_path / "s", scores, minimize=True))
    low, high = figure.axes[0].get_xlim()
    assert high - low < 2
    assert max(x for x, _ in find(figure, "dots-1-0")) == high
    assert any("far outside, and drawn at the edge: 1 run and 1 mean" in text for text in texts_of(figure))


@pytest.mark.parametrize("status", [Status.MISSING, Status.CRASHED], ids=lambda status: status.value)
def test_study_without_a_single_run_is_drawn(status, tmp_path):
    study = sweep_of(tmp_path / "s", "noisytune", ["0.1", "0.2"])
    for result in study.results:
        (result.trial.folder / "score.json").unlink()
    scores = {name: [status] * 2 for name in ("plain", "noisytune=0.1", "noisytune=0.2")}
    study = make_study(tmp_path / "t", scores, sweeps=["noisytune=0.1,0.2"])
    with rc_context(STYLE):
        figures = all_figures(study)
        for figure in figures:
            assert_apart(figure)
    assert f"2 {status.value}" in texts_of(figures[0])
    assert any(f"noisytune=0.1: 2 {status.value}" in text for text in texts_of(figures[1]))


def test_runs_of_others_are_drawn_too(tmp_path):
    for arm, scores in (("plain", (0.1, 0.2, 0.3)), ("mixout", (0.4, 0.5, 0.6))):
        for seed, score in enumerate(scores):
            (tmp_path / arm / str(seed)).mkdir(parents=True)
            (tmp_path / arm / str(seed) / "all_results.json").write_text(f'{{"acc": {score}}}')
    study = compare_runs([f"{tmp_path}/plain/*", f"{tmp_path}/mixout/*"], metric="acc")
    with rc_context(STYLE):
        figure = arms_figure(study)
        assert_apart(figure)
    assert sorted(x for x, _ in find(figure, "dots-1-0")) == [0.4, 0.5, 0.6]
    assert not sweeps_of(study)


def test_dots_of_equal_values_lie_apart():
    offsets = dots.spread(20)
    assert all(-0.5 < offset < 0.5 for offset in offsets)
    assert min(b - a for a, b in zip(sorted(offsets), sorted(offsets)[1:], strict=False)) > 0.01


# -- sweeps -----------------------------------------------------------------------------------------------------------


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


# -- files ------------------------------------------------------------------------------------------------------------


def invoke(*args: object):
    return CliRunner().invoke(main, ["study", *map(str, args)])


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF-"), ("a.svg", b"<?xml")])
def test_plot_writes_the_arms_and_each_sweep_beside_them(name, magic, tmp_path):
    sweep_of(tmp_path / "s", "noisytune", ["0.1", "0.2"])
    assert invoke("--plot", tmp_path / name, tmp_path / "s").exit_code == 0
    other = tmp_path / name.replace("a.", "a-noisytune.")
    assert all(path.read_bytes().startswith(magic) for path in (tmp_path / name, other))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, other.name, "s"])


def test_compare_draws_too(tmp_path):
    for name in ("a1", "a2", "b1", "b2"):
        (tmp_path / f"{name}.log").write_text("acc = 0.5\n")
    done = invoke("compare", f"{tmp_path}/a*", f"{tmp_path}/b*", "--metric", "acc", "--plot", tmp_path / "c.svg")
    assert (done.exit_code, done.stderr) == (0, "")
    assert (tmp_path / "c.svg").read_bytes().startswith(b"<?xml")


REFUSED = "--plot: expected a file that ends in .png, .pdf or .svg, got a.gif. Correct the name."


@pytest.mark.parametrize(
    "arguments",
    [
        ("--plot", "a.gif", "nowhere"),
        ("-o", "s", "--plot", "a.gif", "--", "true", "{seed}"),
        ("compare", "none*", "nothing*", "--metric", "m", "--plot", "a.gif"),
    ],
    ids=["study", "run", "compare"],
)
def test_plot_is_refused_before_anything_is_done(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert (done.exit_code, done.stderr) == (1, f"error: {REFUSED}\n")
    assert not list(tmp_path.iterdir())


def test_plot_of_commands_that_are_only_printed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("-o", "s", "--seeds", 2, "--metric", "m", "--arm", "rdrop=1", "--print", "--plot", "a.svg", "--",
                  "true", "{seed}")  # fmt: skip
    message = "--plot: expected runs to draw, got --print, which runs none. Leave one of them out."
    assert (done.exit_code, done.stderr) == (1, f"error: {message}\n")


def test_plot_needs_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = invoke("--plot", tmp_path / "a.svg", "nowhere")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: --plot: expected matplotlib, got no such package. Install it with ")


# -- within a page ----------------------------------------------------------------------------------------------------


def test_svg_in_a_page_has_ids_of_its_own_and_nothing_of_another_place(studies):
    svg = draw_study(studies["twelve"], ".svg")
    one, other = (for_page(svg["arms"], prefix) for prefix in ("one", "two"))
    assert one.startswith('<svg viewBox="0 0 ')
    assert one.endswith("</svg>")
    ids = [{part.partition('"')[0] for part in text.split(' id="')[1:]} for text in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = {part.partition('"')[0] for part in one.split('href="#')[1:]}
    used |= {part.partition(")")[0] for part in one.split("url(#")[1:]}
    assert used
    assert used <= ids[0]
    assert "http" not in one
    assert "xlink" not in one
    assert "#1f2328" not in one


def test_svg_in_a_page_changes_no_text(tmp_path):
    name = "mixout=0.7 'include=id=\"a\" : #1f2328'"
    study = make_study(tmp_path / "s", {"plain": draw_scores(2), name: draw_scores(2)})
    assert 'id="a" : #1f2328\'' in for_page(draw_study(study, ".svg")["arms"], "p")
