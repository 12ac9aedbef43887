"""Figures of a study: what is drawn is the data, and all texts stay apart, of 2, 12 and 36 arms."""

import math
import sys

import pytest
from click.testing import CliRunner
from drawn import all_figures, assert_apart, find, grid, sweep_of, texts_of
from matplotlib import rc_context
from studies import draw_scores, make_study, twelve_arms, two_arms

from surgery.cli import main
from surgery.report.drawing import STYLE
from surgery.report.study import dots
from surgery.report.study.arms_figure import arms_figure
from surgery.report.study.figures import draw_study, for_page
from surgery.report.study.runs import sweeps_of
from surgery.study.collect import Study
from surgery.study.others import compare_runs
from surgery.study.trial import Status


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Study]:
    folder = tmp_path_factory.mktemp("studies")
    return {"two": two_arms(folder / "2"), "twelve": twelve_arms(folder / "12"), "grid": grid(folder / "36")}


# -- all figures ------------------------------------------------------------------------------------------------------


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
    heights = [y for line in crosses for y in line.get_ydata()] + [y for _, y in find(figure, "dots-1-0")]
    assert len(set(heights)) == 3
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
