"""Make surgery/checkpoint/model_types.json: sweep every model type of the installed transformers on the meta device.

    make model-types

For a newer transformers, run it again and commit the file. What cannot be built is listed at the end.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import transformers
import zoo

from surgery.checkpoint.buffer_rules import role_by_rules
from surgery.checkpoint.model_types import ModelType, as_pattern

TABLE = Path(__file__).resolve().parent.parent / "surgery" / "checkpoint" / "model_types.json"
LAYERS = 8
"""Deep enough for every kind of layer: some stand in every eighth place only."""


@dataclass(frozen=True)
class Swept:
    """A model type: its classes, the errors of those that cannot be built, and the model types of configs within."""

    model_type: str
    classes: tuple[Any, ...]
    errors: dict[str, str]
    nested: frozenset[str]


def sweep(model_type: str, layers: int = LAYERS) -> Swept:
    """Build each class of a model type, and take in what it holds."""
    found, errors = [], {}
    for class_name, model in zoo.build_all(model_type, layers=layers):
        if isinstance(model, Exception):
            errors[class_name] = f"{type(model).__name__}: {' '.join(str(model).split())[:100]}"
        else:
            found.append(zoo.describe(class_name, model))
    nested = zoo.nested_types(model_type) - {model_type} if found else ()
    return Swept(model_type, tuple(found), errors, frozenset(nested))


def entry_of(found: Iterable[Any], *, nested: ModelType | None = None) -> tuple[set[str], set[str]]:
    """Return the names of buffers of a model type, and of the parameters that else would be taken for buffers."""
    found = list(found)
    buffers = {_shorten(as_pattern(_strip(name, one.prefix))) for one in found for name in one.buffers}
    for one in found:  # what the class no longer saves, an older file may hold
        hidden = (n for n, shape in one.transient.items() if not role_by_rules(n, shape, one.names).is_buffer)
        buffers |= {as_pattern(_strip(name, one.prefix)) for name in hidden}
    known = ModelType("", frozenset(buffers) | (nested.buffers if nested else frozenset()), frozenset())
    parameters = set()
    for one in found:
        for name, shape in one.parameters.items():
            if known.is_buffer(name) or role_by_rules(name, shape, one.names).is_buffer:
                parameters.add(as_pattern(_strip(name, one.prefix)))
    return buffers, parameters


def _shorten(pattern: str) -> str:
    """Keep of a batch norm's statistics, which are most of all buffers, the last name alone: no parameter bears it."""
    last = pattern.rpartition(".")[2]
    return last if last in ("running_mean", "running_var") else pattern


def _strip(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.") if prefix else name


def make_table(all_swept: Iterable[Swept]) -> dict[str, Any]:
    """Return what model_types.json holds."""
    all_swept = [swept for swept in all_swept if swept.classes]
    buffers = {swept.model_type: entry_of(swept.classes)[0] for swept in all_swept}
    parameters = {}
    for swept in all_swept:
        inner = frozenset(name for other in swept.nested for name in buffers.get(other, ()))
        parameters[swept.model_type] = entry_of(swept.classes, nested=ModelType("", inner, frozenset()))[1]
        if both := parameters[swept.model_type] & buffers[swept.model_type]:
            raise SystemExit(f"{swept.model_type}: a parameter of one class is a buffer of another: {sorted(both)}")
    return {
        "transformers": transformers.__version__,
        "types": " ".join(sorted(buffers)),
        "buffers": {kind: sorted(names) for kind, names in sorted(buffers.items()) if names},
        "parameters": {kind: sorted(names) for kind, names in sorted(parameters.items()) if names},
    }


def main() -> None:
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        all_swept = list(pool.map(sweep, zoo.model_types(), chunksize=8))
    table = make_table(all_swept)
    TABLE.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    classes = sum(len(swept.classes) for swept in all_swept)
    errors = [f"  {s.model_type}: {name}: {error}" for s in all_swept for name, error in s.errors.items()]
    print(f"{len(table['types'].split())} model types, {classes} classes; {len(errors)} not built:", *errors, sep="\n")


if __name__ == "__main__":
    main()
