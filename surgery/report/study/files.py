"""The files of a study: table.md, table.tex, trials.csv, figures, and the page that shows all of it."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engines.job import write_whole
from surgery.escapes import printable
from surgery.report.drawing import has_matplotlib
from surgery.report.study.figures import draw_study
from surgery.report.study.page import PAGE, page
from surgery.report.study.table import failed, interval, p_value
from surgery.study.summary import figure

if TYPE_CHECKING:
    from surgery.study.collect import Study

HEADER = ("arm", "n", "mean", "95 % of the mean", "std", "median", "failed", "difference", "p", "what can be said")
TRIALS = ("arm", "seed", "status", "metric", "failed", "seconds", "peak_memory", "file", "rule", "why")


def write_files(study: "Study", rows: Mapping[str, Any], folder: Path) -> None:
    """Write all of them; the figures where matplotlib is installed."""
    write_whole(folder / "table.md", as_markdown(rows))
    write_whole(folder / "table.tex", as_latex(rows))
    write_whole(folder / "trials.csv", as_csv(study))
    figures = draw_study(study, ".svg") if has_matplotlib() else {}
    for name, svg in figures.items():
        write_whole(folder / f"{name}.svg", svg.decode())
    write_whole(folder / PAGE, page(study, rows, [HEADER, *map(_cells, rows["arms"])], figures))


def _cells(arm: Mapping[str, Any]) -> list[str]:
    difference = arm["difference"]
    found = "" if difference is None else f"{figure(difference['mean'])} ({interval(difference)})".replace(" ()", "")
    return [
        arm["name"],
        str(arm["n"]),
        *("" if arm[name] is None else figure(arm[name]) for name in ("mean",)),
        interval(arm),
        *("" if arm[name] is None else figure(arm[name]) for name in ("std", "median")),
        failed(arm),
        found,
        "" if difference is None or difference["p_corrected"] is None else p_value(difference["p_corrected"]),
        arm["verdict"],
    ]


def as_markdown(rows: Mapping[str, Any]) -> str:
    """Return the arms as a table of Markdown."""
    cells = [[_escape_markdown(cell) for cell in _cells(arm)] for arm in rows["arms"]]
    lines = [HEADER, ["---"] * len(HEADER), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escape_markdown(text: str) -> str:
    return "".join(f"\\{c}" if c in "|*_`<>[]\\" else c for c in printable(text))


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {c: f"\\{c}" for c in "&%$#_{}"} | {"<": r"\textless{}", ">": r"\textgreater{}"}


def as_latex(rows: Mapping[str, Any]) -> str:
    """Return the arms as a tabular of LaTeX, with the rules of booktabs."""
    lines = [" & ".join(_escape_latex(cell) for cell in line) + r" \\" for line in (HEADER, *map(_cells, rows["arms"]))]
    head = r"\begin{tabular}{lrrrrrrrrl}"
    body = [head, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    return "% needs \\usepackage{booktabs}\n" + "\n".join(body) + "\n"


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in printable(text))


def as_csv(study: "Study") -> str:
    """Return a row for each trial, also of those that have no metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(TRIALS)
    for one in study.results:
        value = one.metric.value if one.metric else None
        writer.writerow(
            (
                printable(one.trial.arm.name),
                one.trial.seed,
                one.status.value,
                "" if value is None else repr(value),
                "" if value is None or study.failed_below is None else int(study.is_failed(value)),
                f"{one.result.seconds:.1f}" if one.result else "",
                one.result.peak_memory if one.result and one.result.peak_memory else "",
                printable(one.metric.file) if one.metric else "",
                printable(one.metric.rule) if one.metric else "",
                printable(one.why),
            )
        )
    return text.getvalue()
