"""Figures of studies, and what is drawn in them: points by id, texts, and whether these stay apart."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text
from studies import draw_scores, make_study

from surgery.report.study.arms_figure import arms_figure
from surgery.report.study.runs import sweeps_of
from surgery.report.study.sweep_figure import sweep_figure
from surgery.study.collect import Study

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
