"""Make surgery/checkpoint/model_types.json: sweep all models of transformers and diffusers on the meta device.

    make model-types

For a newer transformers or diffusers, run it again and commit the file. What cannot be built is listed at the end.
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
import zoo_diffusers

from surgery.checkpoint.described_class import describe, model_type_of
from surgery.checkpoint.model_types import ModelType

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
            errors[class_name] = _one_line(model)
        else:
            found.append(describe(class_name, model))
    nested = zoo.nested_types(model_type) - {model_type} if found else ()
    return Swept(model_type, tuple(found), errors, frozenset(nested))


def sweep_diffusers() -> list[Swept]:
    """Build each class of the installed diffusers, which its config names as `_class_name`."""
    swept = []
    for name, kind in zoo_diffusers.classes():
        try:
            swept.append(Swept(name, (describe(name, zoo_diffusers.build(kind)),), {}, frozenset()))
        except Exception as error:  # its default config leaves something open
            swept.append(Swept(name, (), {name: _one_line(error)}, frozenset()))
    return swept


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def make_table(all_swept: Iterable[Swept]) -> dict[str, Any]:
    """Return what model_types.json holds, but for versions."""
    all_swept = [swept for swept in all_swept if swept.classes]
    alone = {swept.model_type: model_type_of(swept.model_type, swept.classes) for swept in all_swept}
    known = {}
    for swept in all_swept:
        inner = frozenset(name for other in swept.nested if other in alone for name in alone[other].buffers)
        nested = ModelType("", inner, frozenset())
        kind = known[swept.model_type] = model_type_of(swept.model_type, swept.classes, nested=nested)
        if both := kind.parameters & kind.buffers:
            raise SystemExit(f"{kind.name}: a parameter of one class is a buffer of another: {sorted(both)}")
    ordered = [known[name] for name in sorted(known)]
    tied = [kind for kind in ordered if kind.ties]
    return {
        "types": " ".join(kind.name for kind in ordered),
        "classes": {kind.name: names for kind in ordered if (names := " ".join(zoo.classes_of(kind.name)))},
        "buffers": {kind.name: sorted(kind.buffers) for kind in ordered if kind.buffers},
        "parameters": {kind.name: sorted(kind.parameters) for kind in ordered if kind.parameters},
        "ties": {kind.name: {name: " ".join(sources) for name, sources in sorted(kind.ties.items())} for kind in tied},
        "untied": " ".join(kind.name for kind in tied if not zoo.is_tied_by_default(kind.name)),
    }


def main() -> None:
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        all_swept = [*pool.map(sweep, zoo.model_types(), chunksize=8), *sweep_diffusers()]
    import diffusers

    versions = {"transformers": transformers.__version__, "diffusers": diffusers.__version__}
    table = versions | make_table(all_swept)
    TABLE.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    classes = sum(len(swept.classes) for swept in all_swept)
    errors = [f"  {s.model_type}: {name}: {error}" for s in all_swept for name, error in s.errors.items()]
    print(f"{len(table['types'].split())} model types, {classes} classes; {len(errors)} not built:", *errors, sep="\n")


if __name__ == "__main__":
    main()
