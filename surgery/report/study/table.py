"""A study as a table for the terminal: an arm a line, what can be said of it below."""

from collections.abc import Mapping
from typing import Any

from surgery.report.tables import Alarm, Column, Terminal, lay_out
from surgery.study.summary import figure

_COLUMNS = (
    Column("arm", is_name=True),
    Column("n", is_number=True),
    Column("mean", is_number=True),
    Column("95 %", is_number=True, rank=2),
    Column("std", is_number=True, rank=3),
    Column("median", is_number=True, rank=7),
    Column("best", is_number=True, rank=5),
    Column("worst", is_number=True, rank=6),
    Column("failed", is_number=True, rank=1),
    Column("better in", is_number=True, rank=8),
    Column("p", is_number=True, rank=4),
    Column("time", is_number=True, rank=9),
    Column("memory", is_number=True, rank=10),
)
_SHOWN_PROBLEMS = 3


def table(rows: Mapping[str, Any], terminal: Terminal) -> str:
    """Lay out rows for people: figures, verdicts, and what went wrong."""
    lines = [
        *terminal.wrap(f"{rows['metric']}, {'less' if rows['minimize'] else 'more'} is better"),
        "",
        *lay_out(_COLUMNS, [_cells(arm) for arm in rows["arms"]], terminal),
        "",
        *(text for arm in rows["arms"][1:] for text in terminal.wrap(f"{arm['name']}: {arm['verdict']}")),
    ]
    details = [*_explanations(rows), *_problems(rows), *(f"note: {note}" for note in rows["notes"])]
    return "\n".join([*lines, *([""] if details else []), *terminal.wrap_all(details)])


def _cells(arm: Mapping[str, Any]) -> list[str]:
    found = arm["difference"] or {}
    name = Alarm(arm["name"]) if "no effect" in arm["trials"] else arm["name"]
    return [
        name,
        str(arm["n"]),
        _figure(arm["mean"]),
        interval(arm),
        _figure(arm["std"]),
        _figure(arm["median"]),
        _figure(arm["best"]),
        _figure(arm["worst"]),
        failed(arm),
        "" if found.get("improvement") is None else f"{found['improvement']:.0%}",
        "" if found.get("p_corrected") is None else p_value(found["p_corrected"]),
        _ratio(found.get("seconds_ratio")),
        _ratio(found.get("memory_ratio")),
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else figure(value)


def interval(row: Mapping[str, Any]) -> str:
    """Write an interval."""
    return "" if row["low"] is None else f"{figure(row['low'])} to {figure(row['high'])}"


def failed(arm: Mapping[str, Any]) -> str:
    """Write how many runs of an arm have failed."""
    return "" if arm["failed"] is None or not arm["values"] else f"{arm['failed']}/{len(arm['values'])}"


def p_value(value: float) -> str:
    """Write a p-value: no digits that 9,999 resamples do not have."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _explanations(rows: Mapping[str, Any]) -> list[str]:
    rule = rows["failed_below"]
    if rule is None:
        return ["failed: not known, as no runs of plain share a worst score; see --failed-below"]
    return [f"failed: {rows['metric']} of {figure(rule['value'])} or {'more' if rows['minimize'] else 'less'} "
            f"({rule['why']})"]  # fmt: skip


def _problems(rows: Mapping[str, Any]) -> list[str]:
    lines = []
    for arm in rows["arms"]:
        states = [f"{count} {status}" for status, count in arm["trials"].items() if status != "done"]
        lines += [f"{arm['name']}: {', '.join(states)}"] if states else []
        shown = arm["problems"][:_SHOWN_PROBLEMS]
        lines += [f"  seed {problem['seed']}: {problem['why']}" for problem in shown]
        if more := len(arm["problems"]) - len(shown):
            lines.append(f"  and {more} more")
    return lines
