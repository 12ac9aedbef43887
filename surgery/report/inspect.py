"""`surgery inspect` as rows and as a table: totals, and tensors grouped by layer pattern."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.display import as_shape, at_commit, number
from surgery.inspect.inspection import REFUSED, components
from surgery.inspect.name_patterns import group
from surgery.recipe import Recipe
from surgery.report.names import full_names
from surgery.report.tables import Alarm, Column, Terminal, lay_out
from surgery.report.text import finite, line, reason_lines
from surgery.roles import CLASS, NAME, RULE
from surgery.sizes import as_bytes

if TYPE_CHECKING:
    from surgery.inspect.inspection import Inspection, TensorInfo
    from surgery.inspect.stats import Stats


def rows(inspection: "Inspection") -> dict[str, Any]:
    """Describe a checkpoint: totals, groups of tensors by layer pattern, and every tensor."""
    checkpoint, tensors = inspection.checkpoint, inspection.tensors
    shards: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = {}
    for info in tensors:
        shards[info.file] += info.tensor.nbytes
        counts = {"tensors": 1, "parameters": info.tensor.size, "bytes": info.tensor.nbytes}
        dtypes.setdefault(info.tensor.dtype, Counter()).update(counts)
    return {
        "source": checkpoint.id,
        "commit": checkpoint.commit,
        "parameters": sum(info.tensor.size for info in tensors),
        "bytes": sum(shards.values()),
        "shards": dict(shards),
        "dtypes": {dtype: dict(counts) for dtype, counts in dtypes.items()},
        "quantized": inspection.quantized,
        "recipe": recipe_row(inspection.recipe) if inspection.recipe else None,
        "tied": {
            _join(folder, a): _join(folder, b) for folder, names in inspection.tied.items() for a, b in names.items()
        },
        "left_out": dict(checkpoint.layout.left_out),
        "groups": _group_rows(inspection),
        "tensors": [_tensor_row(info, is_measured=inspection.is_measured) for info in tensors],
    }


def recipe_row(recipe: Recipe) -> dict[str, Any]:
    """Say in short what made a checkpoint."""
    settings = recipe.settings
    return {"source": recipe.source, "commit": recipe.commit, "lam": settings.lam, "seed": settings.seed,
            "noise": settings.noise, "scale": settings.scale, "rounding": settings.rounding}  # fmt: skip


def recipe_text(row: Mapping[str, Any], source: str) -> str:
    """Write a recipe as a call: perturb(org/name@1234, lam 0.15, seed 0)."""
    defaults = {"noise": "uniform", "scale": "matrix", "rounding": "nearest"}
    others = "".join(f", {name} {row[name]}" for name, default in defaults.items() if row[name] != default)
    return f"perturb({source}, lam {row['lam']:g}, seed {row['seed']}{others})"


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _tensor_row(info: "TensorInfo", *, is_measured: bool) -> dict[str, Any]:
    tensor = info.tensor
    return {"name": tensor.name, "file": info.file, "dtype": tensor.dtype, "shape": list(tensor.shape),
            "bytes": tensor.nbytes, "known": info.known, **_common(info.why, info.stats, is_measured)}  # fmt: skip


def _group_rows(inspection: "Inspection") -> list[dict[str, Any]]:
    component = components(inspection.checkpoint)
    found = group(
        inspection.tensors,
        name=lambda info: _join(component[info.file], info.name),
        kind=lambda info: (info.tensor.dtype, info.tensor.shape, info.why),
    )
    described = []
    for members in found:
        first = members.members[0]
        stats = _pooled([info.stats for info in members.members if info.stats])
        described.append(
            {"pattern": members.pattern, "count": len(members.members), "dtype": first.tensor.dtype,
             "shape": list(first.tensor.shape), **_common(first.why, stats, inspection.is_measured)}
        )  # fmt: skip
    return described


def _pooled(stats: "list[Stats]") -> "Stats | None":
    if not stats:
        return None
    from surgery.inspect.stats import pool_stats  # takes NumPy, which headers alone must not wait for

    return pool_stats(stats)


def _common(why: str | None, stats: "Stats | None", is_measured: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"perturbed": why is None}
    if why:
        row["why"] = why
    if is_measured:
        row["stats"] = _stats_row(stats) if stats else None
    return row


def _stats_row(stats: "Stats") -> dict[str, Any]:
    moments = stats.moments
    return {
        "mean": finite(moments.mean) if moments.n else None,
        "std": finite(moments.std) if moments.n else None,
        "min": finite(stats.min),
        "max": finite(stats.max),
        "nan": stats.nan,
        "inf": stats.inf,
    }


_COLUMNS = (
    Column("tensor", is_name=True),
    Column("dtype", rank=3),
    Column("shape", rank=4),
    Column("", is_number=True, rank=1),
    Column("mean", is_number=True, rank=5),
    Column("std", is_number=True, rank=2),
    Column("min", is_number=True, rank=7),
    Column("max", is_number=True, rank=6),
    Column("NaN", is_number=True, rank=1),
    Column("Inf", is_number=True, rank=1),
    Column("bytes", is_number=True, rank=8),
    Column("shard", is_flexible=True, rank=9),
    Column("perturb", is_flexible=True, rank=1),
)


def table(rows: Mapping[str, Any], terminal: Terminal, *, is_all: bool) -> str:
    """Lay out rows for people.

    Args:
        is_all: a line for each tensor instead of one for each group.
    """
    lines = terminal.wrap_all([as_source(rows), *_summary(rows)])
    listed = rows["tensors"] if is_all else rows["groups"]
    names = full_names(listed) if is_all else [group["pattern"] for group in listed]
    cells = [_cells(name, row) for name, row in zip(names, listed, strict=True)]
    return "\n".join([*lines, "", *lay_out(_COLUMNS, cells, terminal)])


def _summary(rows: Mapping[str, Any]) -> list[str]:
    tensors = rows["tensors"]
    perturbed = sum(tensor["perturbed"] for tensor in tensors)
    dtypes = (f"{dtype.lower()} {counts['parameters']:,}" for dtype, counts in rows["dtypes"].items())
    shards = len(rows["shards"])
    lines = [
        line("parameters", f"{rows['parameters']:,}   ({', '.join(dtypes)})"),
        line("bytes", f"{as_bytes(rows['bytes'])} in {shards} file{'s' * (shards != 1)}"),
        line("tensors", f"{len(tensors)}; perturb changes {perturbed} and copies {len(tensors) - perturbed}"),
    ]
    known = Counter(tensor["known"] for tensor in tensors)
    lines.append(line("known by", ", ".join(f"{how} {known[how]}" for how in (CLASS, RULE, NAME) if known[how])))
    if rows["quantized"]:
        lines.append(line("quantized", f"{rows['quantized']}: perturb refuses it"))
    if rows["recipe"]:
        lines.append(line("recipe", recipe_text(rows["recipe"], as_source(rows["recipe"]))))
    lines += [line("tied", f"{name} is {kept}") for name, kept in rows["tied"].items()]
    return lines + reason_lines("left out", rows["left_out"].items())


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    stats = row.get("stats")
    figures = [number(stats[key]) for key in ("mean", "std", "min", "max")] if stats else [""] * 4
    if "stats" in row and not stats:
        figures[0] = "not measured"
    flaws = [Alarm(f"{stats[key]:,}") if stats and stats[key] else "" for key in ("nan", "inf")]
    return [
        name,
        row["dtype"].lower(),
        as_shape(row["shape"]),
        f"x{row['count']}" if row.get("count", 1) > 1 else "",
        *figures,
        *flaws,
        f"{row['bytes']:,}" if "bytes" in row else "",
        row.get("file", ""),
        "perturbed" if row["perturbed"] else row["why"] if row["why"] in REFUSED else f"copied: {row['why']}",
    ]


def as_source(row: Mapping[str, Any]) -> str:
    """Write where a checkpoint is from: a path, or org/name@1234."""
    return at_commit(row["source"], row["commit"])
