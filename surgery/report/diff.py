"""`surgery diff` as rows and as a table: totals, and the tensors that differ, the worst first."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.display import as_shape, number
from surgery.errors import some
from surgery.inspect.comparison import CHANGED, EQUAL, ONLY_IN_A, ONLY_IN_B, RESHAPED
from surgery.noise import UNIT_STD
from surgery.report.inspect import as_source, recipe_row, recipe_text
from surgery.report.tables import Alarm, Column, Terminal, lay_out
from surgery.report.text import as_share, finite, line

if TYPE_CHECKING:
    from surgery.checkpoint.resolve import Checkpoint
    from surgery.inspect.comparison import Comparison, TensorComparison
    from surgery.inspect.tensor_diff import TensorDiff

_SHOWN = 20


def rows(comparison: "Comparison") -> dict[str, Any]:
    """Describe a comparison: totals, and every tensor, the worst first."""
    pairs = [tensor.pair for tensor in comparison.tensors if tensor.pair]
    changed = [pair for pair in pairs if pair.changed]
    agreement = comparison.agreement
    return {
        "a": _side(comparison.a),
        "b": _side(comparison.b),
        "counts": {kind: comparison.count(kind) for kind in (CHANGED, EQUAL, RESHAPED, ONLY_IN_A, ONLY_IN_B)},
        "elements": sum(t.a.size for t in comparison.tensors if t.a and t.pair),
        "elements_changed": sum(pair.changed for pair in pairs),
        "not_finite": sum(pair.broken for pair in pairs),
        "max_abs_d": finite(max((pair.max_d for pair in pairs), default=0.0)),
        "rms_d": finite(_rms(pairs)),
        "rms_d_over_std": finite(_rms_over_std(changed)),
        "recipe": None
        if agreement is None
        else {
            **recipe_row(agreement.recipe),
            "rms_d_over_std_expected": agreement.recipe.settings.lam * UNIT_STD,
            "agrees": not agreement.disagreeing,
            "disagreeing": dict(agreement.disagreeing),
        },
        "tensors": [_tensor_row(tensor) for tensor in comparison.tensors],
    }


def _side(checkpoint: "Checkpoint") -> dict[str, Any]:
    return {"source": checkpoint.id, "commit": checkpoint.commit}


def _rms(pairs: "list[TensorDiff]") -> float:
    n = sum(pair.measured for pair in pairs)
    return math.sqrt(math.fsum(pair.sum_d2 for pair in pairs) / n) if n else 0.0


def _rms_over_std(pairs: "list[TensorDiff]") -> float:
    """Return the root of the mean of (d / std(A))^2 over all elements of tensors that have a std."""
    spread = [(pair.measured, pair.rms_over_std) for pair in pairs if math.isfinite(pair.rms_over_std)]
    n = sum(count for count, _ in spread)
    return math.sqrt(math.fsum(count * far * far for count, far in spread) / n) if n else 0.0


def _tensor_row(tensor: "TensorComparison") -> dict[str, Any]:
    row: dict[str, Any] = {"name": tensor.name, "kind": tensor.kind}
    for label, side in (("a", tensor.a), ("b", tensor.b)):
        if side:
            row[label] = {"name": side.name, "dtype": side.dtype, "shape": list(side.shape)}
    if pair := tensor.pair:
        row |= {"changed": pair.changed, "not_finite": pair.broken}
        if pair.measured:
            std = pair.stats.moments.std if pair.stats else None
            row |= {"max_abs_d": finite(pair.max_d), "rms_d": finite(pair.rms), "std": finite(std),
                    "rms_d_over_std": finite(pair.rms_over_std), "cosine": finite(pair.cosine)}  # fmt: skip
    return row


_COLUMNS = (
    Column("tensor", is_name=True),
    Column("max |d|", is_number=True, rank=4),
    Column("rms d", is_number=True, rank=5),
    Column("rms d / std", is_number=True, rank=2),
    Column("cosine", is_number=True, rank=3),
    Column("differ", is_number=True, rank=6),
    Column("", is_flexible=True, rank=1),
)


def table(rows: Mapping[str, Any], terminal: Terminal, *, is_all: bool) -> str:
    """Lay out rows for people.

    Args:
        is_all: a line for each tensor, not only for the worst.
    """
    lines = [f"{label} {as_source(rows[label.lower()])}" for label in "AB"] + _summary(rows)
    listed = [row for row in rows["tensors"] if is_all or row["kind"] != EQUAL]
    shown = listed if is_all else listed[:_SHOWN]
    body = ["", *lay_out(_COLUMNS, [_cells(row) for row in shown], terminal)] if shown else []
    if len(listed) > len(shown):
        body += terminal.wrap(f"{len(listed) - len(shown)} more differ less: --all shows them")
    return "\n".join([*terminal.wrap_all(lines), *body])


def _summary(rows: Mapping[str, Any]) -> list[str]:
    counts = rows["counts"]
    named = {
        CHANGED: "changed",
        EQUAL: "equal",
        RESHAPED: "of another shape",
        ONLY_IN_A: ONLY_IN_A,
        ONLY_IN_B: ONLY_IN_B,
    }
    kinds = [f"{counts[kind]} {name}" for kind, name in named.items() if counts[kind] or kind in (CHANGED, EQUAL)]
    share = as_share(rows["elements_changed"], rows["elements"])
    lines = [
        line("tensors", ", ".join(kinds)),
        line("elements", f"{rows['elements_changed']:,} of {rows['elements']:,} differ ({share})"),
        line("max |d|", number(rows["max_abs_d"])),
        line("rms d", number(rows["rms_d"])),
        line("rms d / std", f"{_ratio(rows['rms_d_over_std'])}   (std of A; of the tensors that changed. "
             "For NoisyTune this is lam / sqrt(12))"),
    ]  # fmt: skip
    if rows["not_finite"]:
        lines.append(line("not finite", f"{rows['not_finite']:,} of those that differ are NaN or Inf"))
    return lines + (_recipe_lines(rows["recipe"]) if rows["recipe"] else [])


def _recipe_lines(recipe: Mapping[str, Any]) -> list[str]:
    wrong = recipe["disagreeing"]
    expected = f"lam / sqrt(12) = {recipe['rms_d_over_std_expected']:.4f}"
    verdict = f"the figures do not agree in {len(wrong)} tensors" if wrong else "the figures agree"
    lines = [
        line("recipe", f"B is {recipe_text(recipe, 'A')}, says its surgery.json"),
        line("", f"{expected}; {verdict}"),
    ]
    lines += [line("", f"{name}: {fault}") for name, fault in list(wrong.items())[:_SHOWN]]
    return lines + ([line("", f"and {some(list(wrong)[_SHOWN:])}")] if len(wrong) > _SHOWN else [])


def _cells(row: Mapping[str, Any]) -> list[str]:
    figures = (
        [number(row["max_abs_d"]), number(row["rms_d"]), _ratio(row["rms_d_over_std"]), _cosine(row["cosine"])]
        if "rms_d" in row
        else [""] * 4
    )
    return [row["name"], *figures, f"{row['changed']:,}" if "changed" in row else "", _note(row)]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 1000 else f"{value:.4g}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _note(row: Mapping[str, Any]) -> str:
    if row["kind"] in (ONLY_IN_A, ONLY_IN_B, EQUAL):
        return str(row["kind"])
    a, b = row["a"], row["b"]
    notes = [f"{row['not_finite']:,} NaN or Inf"] if row.get("not_finite") else []
    if a["shape"] != b["shape"]:
        notes.append(f"{as_shape(a['shape'])} -> {as_shape(b['shape'])}")
    if a["dtype"] != b["dtype"]:
        notes.append(f"{a['dtype'].lower()} -> {b['dtype'].lower()}")
    if a["name"] != b["name"]:
        notes.append(f"{b['name']} in B")
    note = ", ".join(notes)
    return Alarm(note) if row.get("not_finite") else note
