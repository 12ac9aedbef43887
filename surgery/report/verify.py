"""`surgery verify` as rows and as a table: equal or not, and the tensors that differ, the worst first."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from surgery.escapes import printable
from surgery.perturb.verify import Verification
from surgery.report.tables import Alarm, Column, Terminal, lay_out
from surgery.report.text import as_bytes, line

_SHOWN = 20
_TITLES = ("differ", "of", "max |d|", "max |d| / std", "NaN or Inf")


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
    verdict = "bit for bit equal to" if rows["equal"] else terminal.alarm("NOT equal") + " to"
    lines = [
        f"{printable(rows['folder'])} is {verdict} what its recipe makes of {printable(rows['source'] + commit)}",
        line("tensors", f"{rows['tensors'] - len(differences)} equal, {len(differences)} differ"),
        line("read", f"{as_bytes(rows['bytes'])} in {rows['seconds']:.2f} s, {rows['gb_per_second']:.2f} GB/s"),
        *terminal.wrap_all([line("fault", fault) for fault in rows["faults"]]),
    ]
    return "\n".join(lines + (_difference_lines(differences, terminal) if differences else []))


def _difference_lines(differences: list[Mapping[str, Any]], terminal: Terminal) -> list[str]:
    columns = [Column("tensor", is_flexible=True), *(Column(title, is_number=True) for title in _TITLES)]
    lines = lay_out(columns, [_cells(row) for row in differences[:_SHOWN]], terminal)
    more = len(differences) - _SHOWN
    return ["", *lines] + ([f"{more} more differ: --json lists all of them"] if more > 0 else [])


def _cells(row: Mapping[str, Any]) -> list[str]:
    sizes = ["" if row[key] is None else f"{row[key]:.3g}" for key in ("max_abs", "max_over_std")]
    broken = Alarm(f"{row['not_finite']:,}") if row["not_finite"] else ""
    return [row["name"], f"{row['differing']:,}", f"{row['elements']:,}", *sizes, broken]
