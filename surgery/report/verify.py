"""`surgery verify` as rows and as a table: equal or not, and the tensors that differ, the worst first."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from surgery.escapes import printable
from surgery.perturb.verify import Verification
from surgery.report.names import full_names
from surgery.report.tables import Alarm, Column, Terminal, lay_out
from surgery.report.text import as_pace, line

_SHOWN = 20
_NOT_EQUAL = "NOT equal"
_COLUMNS = (
    Column("tensor", is_name=True),
    Column("differ", is_number=True, rank=2),
    Column("of", is_number=True, rank=5),
    Column("max |d|", is_number=True, rank=4),
    Column("max |d| / std", is_number=True, rank=3),
    Column("NaN or Inf", is_number=True, rank=1),
)


def rows(found: Verification, seconds: float) -> dict[str, Any]:
    """Describe what was verified, and every tensor that differs, the worst first."""
    return {
        "folder": found.folder,
        "source": found.source,
        "commit": found.commit,
        "equal": found.is_equal,
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "seconds": seconds,
        "gb_per_second": found.nbytes / 1e9 / seconds,
        "differences": [asdict(d) | {"max_over_std": d.max_over_std} for d in found.differences],
        "faults": list(found.faults),
    }


def table(rows: Mapping[str, Any], terminal: Terminal) -> str:
    """Lay out rows for people."""
    commit = f"@{rows['commit'][:12]}" if rows["commit"] else ""
    differences = rows["differences"]
    verdict = "bit for bit equal" if rows["equal"] else _NOT_EQUAL
    lines = [
        f"{printable(rows['folder'])} is {verdict} to what its recipe makes of {printable(rows['source'] + commit)}",
        line("tensors", f"{rows['tensors'] - len(differences)} equal, {len(differences)} differ"),
        line("read", as_pace(rows["bytes"], rows["seconds"])),
        *[line("fault", fault) for fault in rows["faults"]],
    ]
    wrapped = [part.replace(_NOT_EQUAL, terminal.alarm(_NOT_EQUAL)) for part in terminal.wrap(lines[0])]
    wrapped += terminal.wrap_all(lines[1:])
    return "\n".join(wrapped + (_difference_lines(differences, terminal) if differences else []))


def _difference_lines(differences: list[Mapping[str, Any]], terminal: Terminal) -> list[str]:
    names = full_names(differences)[:_SHOWN]
    cells = [_cells(name, row) for name, row in zip(names, differences[:_SHOWN], strict=True)]
    more = len(differences) - _SHOWN
    below = terminal.wrap(f"{more} more differ: --json lists all of them") if more > 0 else []
    return ["", *lay_out(_COLUMNS, cells, terminal), *below]


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    sizes = ["" if row[key] is None else f"{row[key]:.3g}" for key in ("max_abs", "max_over_std")]
    broken = Alarm(f"{row['not_finite']:,}") if row["not_finite"] else ""
    return [name, f"{row['differing']:,}", f"{row['elements']:,}", *sizes, broken]
