"""`surgery perturb` and `materialize` as rows and as a table: what was done, or with --dry-run would be."""

import math
import re
from collections.abc import Mapping
from typing import Any

from surgery.checkpoint.layout import RECIPE
from surgery.errors import some
from surgery.escapes import shell_join
from surgery.noise import UNIT_STD
from surgery.perturb.parts import Part
from surgery.perturb.plan import Plan
from surgery.recipe import PERTURBED, Recipe
from surgery.report.tables import Terminal
from surgery.report.text import as_pace, line, reason_lines
from surgery.sizes import as_bytes
from surgery.storage.url import Url

_ACTS_IN_QUOTES = re.compile(r'["$`!]|\\\\')  # of a shell


def plan_rows(plan: Plan) -> dict[str, Any]:
    """Describe a plan: counts, bytes and, per tensor, whether it is perturbed or why not."""
    tensors = [
        {
            "name": tensor.name,
            "file": shard.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "perturbed": tensor.name not in shard.copied,
            "known": shard.roles[tensor.name].known,
            **({"why": shard.copied[tensor.name]} if tensor.name in shard.copied else {}),
        }
        for shard in plan.shards
        for tensor in shard.header.tensors
    ]
    return {
        "source": plan.checkpoint.id,
        "commit": plan.checkpoint.commit,
        "out": str(plan.out),
        "bytes": sum(plan.sizes.values()),
        "recipe_only": plan.is_recipe_only,
        "shards": len(plan.shards),
        "parameters": _parameters(tensors),
        "command": plan.command,
        "companions": list(plan.companions),
        "left_out": plan.left_out,
        "tied": {name: kept for shard in plan.shards for name, kept in shard.tied.items()},
        "tensors": tensors,
    }


def rows(recipe: Recipe, plan: Plan, seconds: float, *, is_new: bool, part: Part | None = None) -> dict[str, Any]:
    """Describe a finished run: counts, what the noise did, time and, per tensor, the recipe's record.

    Args:
        is_new: whether this run wrote the checkpoint, or found it finished.
        part: of the run that this process did, if others did the rest.
    """
    tensors = [{"file": file.name, **tensor.to_json()} for file in recipe.files for tensor in file.tensors]
    effects = [(math.prod(t.shape), t.effect) for t in recipe.tensors if t.effect]
    own = {shard.name for shard in (part.of(plan.shards) if part else plan.shards)}
    others = {shard.name for shard in plan.shards} - own
    sizes = sum(nbytes for name, nbytes in plan.sizes.items() if name not in others)
    nbytes = sizes + plan.is_recipe_only * len(recipe.to_json().encode()) if is_new else 0
    weight = sum(size for size, _ in effects)
    return {
        "source": recipe.source,
        "commit": recipe.commit,
        "out": str(plan.out),
        "lam": recipe.settings.lam,
        "seed": recipe.settings.seed,
        "parameters": _parameters(tensors),
        "noise_over_std": sum(e.noise_over_std for _, e in effects) / len(effects) if effects else 0.0,
        "noise_over_std_expected": recipe.settings.lam * UNIT_STD,
        "survived": sum(size * e.survived for size, e in effects) / weight if weight else 0.0,
        "vanished": recipe.vanished,
        "bytes": nbytes,
        "recipe_only": plan.is_recipe_only,
        "seconds": seconds,
        "gb_per_second": nbytes / 1e9 / seconds,
        "notes": _notes(recipe, plan),
        "next": _next_command(recipe, plan),
        "left_out": recipe.left_out,
        "tied": {name: kept for file in recipe.files for name, kept in file.tied.items()},
        "tensors": tensors,
    }


def _notes(recipe: Recipe, plan: Plan) -> list[str]:
    """Return the recipe's notes, settings that had nothing to act on, and a source that is not a pretrained one."""
    perturbed = [tensor for tensor in recipe.tensors if tensor.copied is None]
    notes = list(recipe.notes)
    if recipe.settings.rounding == "stochastic" and not any(t.dtype in ("F16", "BF16") for t in perturbed):
        notes.append("--rounding stochastic had nothing to do: no 16-bit tensor was perturbed")
    if recipe.dequantize:
        notes.append(f"weights of small floats in blocks were read as {recipe.dequantize}, and their scales left out")
    if recipe.settings.lam == 0:
        notes.append(f"lam is 0: the copy equals the source{', dequantized' if recipe.dequantize else ''}")
    if plan.checkpoint.holds(RECIPE):
        notes.append(PERTURBED)
    return notes


def _next_command(recipe: Recipe, plan: Plan) -> str:
    """Return a command that loads the result as its card does, or that makes the weights."""
    out = plan.out
    if plan.is_recipe_only:
        return shell_join(["surgery", "materialize", str(out), "-o", f"{out}-weights"])
    if isinstance(out, Url):
        return shell_join(["surgery", "verify", str(out)])
    from surgery.perturb.loading import find_own_loading  # takes YAML, which a dry run need not wait for

    code = find_own_loading(recipe, out).for_folder(out)
    return shell_join(["python", "-c", code]) if _ACTS_IN_QUOTES.search(code) else f'python -c "{code}"'


def _written(rows: Mapping[str, Any]) -> str:
    if not rows["bytes"]:
        return "nothing: this command had finished here before"
    if rows["recipe_only"]:
        return f"{as_bytes(rows['bytes'])}: the recipe and its companions, without weights"
    return as_pace(rows["bytes"], rows["seconds"])


def _survived(share: float) -> str:
    """Say what rounding left of the noise: it adds to it where the steps of the dtype are as large."""
    if share < 1.00005:
        return f"{share:.2%} of the noise, after rounding"
    return f"all of the noise, {share:.4f} times as large after rounding"


def _parameters(tensors: list[dict[str, Any]]) -> int:
    return sum(math.prod(tensor["shape"]) for tensor in tensors if tensor["perturbed"])


def plan_table(rows: Mapping[str, Any], terminal: Terminal) -> str:
    """Lay out plan_rows for people."""
    lines = [
        _title(rows, "would be perturbed into"),
        *_tensor_lines(rows),
        line("bytes", f"{as_bytes(rows['bytes'])} in {rows['shards']} shard{'s' * (rows['shards'] > 1)} and "
              f"{len(rows['companions'])} companion files"),
        *([line("tasks", f"{rows['tasks']:,}")] if "tasks" in rows else []),
        *reason_lines("left out", rows["left_out"].items()),
    ]  # fmt: skip
    commands = [f"run: {rows['command']}", *([f"then: {rows['push']}"] if "push" in rows else [])]
    return "\n".join(terminal.wrap_all(lines) + commands)


def table(rows: Mapping[str, Any], terminal: Terminal) -> str:
    """Lay out rows for people, with the next command to try."""
    expected = rows["noise_over_std_expected"]
    lines = [
        _title(rows, "perturbed into"),
        *_tensor_lines(rows),
        line("noise / std", f"{rows['noise_over_std']:.4f}   (lam / sqrt(12) = {expected:.4f})"),
        line("survived", _survived(rows["survived"])),
    ]
    if vanished := rows["vanished"]:
        hint = "--rounding stochastic keeps its mean"
        lines.append(line("vanished", f"noise lost in {len(vanished)} tensors ({some(vanished)}); {hint}"))
    lines += [line("note", note) for note in rows["notes"]]
    lines += [line("written", _written(rows)), *reason_lines("left out", rows["left_out"].items())]
    return "\n".join([*terminal.wrap_all(lines), f"next: {rows['next']}"])


def _title(rows: Mapping[str, Any], verb: str) -> str:
    commit = f"@{rows['commit'][:12]}" if rows["commit"] else ""
    return f"{rows['source']}{commit} {verb} {rows['out']}"


def _tensor_lines(rows: Mapping[str, Any]) -> list[str]:
    tensors = rows["tensors"]
    perturbed = sum(tensor["perturbed"] for tensor in tensors)
    lines = [
        line("tensors", f"{perturbed} perturbed, {len(tensors) - perturbed} copied"),
        line("parameters", f"{rows['parameters']:,} perturbed"),
    ]
    lines += reason_lines("copied", [(tensor["name"], tensor["why"]) for tensor in tensors if not tensor["perturbed"]])
    return lines + [line("tied", f"{name} shares the noise of {kept}") for name, kept in rows["tied"].items()]
