"""Whether a checkpoint is what its recipe says."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from surgery.report.text import as_bytes, line
from surgery.verify import Verification

_SHOWN = 20


def verify_rows(found: Verification, seconds: float) -> dict[str, Any]:
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


def verify_table(rows: Mapping[str, Any]) -> str:
    """Lay out verify_rows for people."""
    commit = f"@{rows['commit'][:12]}" if rows["commit"] else ""
    differences = rows["differences"]
    verdict = "bit for bit equal to" if rows["equal"] else "NOT equal to"
    lines = [
        f"{rows['folder']} is {verdict} what its recipe makes of {rows['source']}{commit}",
        line("tensors", f"{rows['tensors'] - len(differences)} equal, {len(differences)} differ"),
        line("read", f"{as_bytes(rows['bytes'])} in {rows['seconds']:.2f} s, {rows['gb_per_second']:.2f} GB/s"),
        *(line("fault", fault) for fault in rows["faults"]),
    ]
    return "\n".join(lines + (_difference_lines(differences) if differences else []))


def _difference_lines(differences: list[Mapping[str, Any]]) -> list[str]:
    shown = differences[:_SHOWN]
    table = [("elements differ", "max |d|", "max |d|/std", "tensor"), *map(_cells, shown)]
    widths = [max(len(cells[column]) for cells in table) for column in range(3)]
    lines = [
        "  " + "  ".join([*(c.rjust(w) for c, w in zip(cells, widths, strict=False)), cells[3]]) for cells in table
    ]
    more = len(differences) - len(shown)
    return lines + ([f"  and {more} more: --json lists all of them"] if more else [])


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    bad = f" ({row['not_finite']:,} NaN or Inf)" if row["not_finite"] else ""
    sizes = ["-" if row[key] is None else f"{row[key]:.3g}" for key in ("max_abs", "max_over_std")]
    return f"{row['differing']:,} of {row['elements']:,}", sizes[0], sizes[1], f"{row['name']}{bad}"
