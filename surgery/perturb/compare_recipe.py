"""Compare two recipes of one run field by field: what was recorded, and what source and settings give."""

from collections.abc import Iterator
from dataclasses import asdict

from surgery.recipe import FileRecord, Recipe, TensorRecord


def recipe_faults(recorded: Recipe, made: Recipe) -> list[str]:
    """Say where a recipe differs from the one that its source and settings give, a sentence each."""
    faults = []
    if recorded.pooled_std != made.pooled_std:
        faults.append(_fault("pooled_std", _text(made.pooled_std), _text(recorded.pooled_std)))
    by_name = {file.name: file for file in recorded.files}
    for file in made.files:
        faults += file_faults(by_name[file.name], file)
    digests = made.companions.items()
    return faults + [
        _fault(f"{name}: digest", digest, str(recorded.companions.get(name)))
        for name, digest in digests
        if digest != recorded.companions.get(name)
    ]


def file_faults(recorded: FileRecord, made: FileRecord) -> list[str]:
    """Say where the record of one file differs from the one that its source and settings give."""
    faults = []
    for label in ("digest", "source_digest", "tied"):
        mine, theirs = getattr(made, label), getattr(recorded, label)
        if mine != theirs:
            faults.append(_fault(f"{made.name}: {label}", str(mine), str(theirs)))
    if [tensor.name for tensor in recorded.tensors] != [tensor.name for tensor in made.tensors]:
        return [*faults, _fault(f"{made.name}: names", "its source's, in their order", "others")]
    for mine, theirs in zip(made.tensors, recorded.tensors, strict=True):
        faults += _tensor_faults(theirs, mine, made.name)
    return faults


def _tensor_faults(recorded: TensorRecord, made: TensorRecord, file: str) -> Iterator[str]:
    mine, theirs = asdict(made), asdict(recorded)
    for label in ("dtype", "shape", "std", "copied", "effect"):
        if mine[label] != theirs[label]:
            yield _fault(f"{file}: {made.name!r}: {label}", _text(mine[label]), _text(theirs[label]))


def _fault(what: str, expected: str, found: str) -> str:
    return f"{what}: expected {expected}, as source and settings give, got {found} in the recipe."


def _text(value: object) -> str:
    return value.hex() if isinstance(value, float) else str(value)
