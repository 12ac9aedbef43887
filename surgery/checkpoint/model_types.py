"""model_types.json: which tensors of each model type of transformers are buffers, from its classes.

tests/make_model_types.py makes the file from the installed transformers. A name in it has `*` for every number, and
stands for all names that end in it, since checkpoints are written with and without a base model's prefix.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_DEPTH = 4  # configs within configs


@dataclass(frozen=True)
class ModelType:
    """What is known of the classes that a config names.

    Args:
        buffers: names of buffers.
        parameters: names of parameters that the rules for unknown classes, or the names of buffers, take for buffers.
    """

    name: str
    buffers: frozenset[str]
    parameters: frozenset[str]

    def is_buffer(self, name: str) -> bool | None:
        """Tell what a tensor is; None if it is not among the names. The longest name that it ends in decides."""
        rest = as_pattern(name) if self.buffers or self.parameters else ""
        while rest:
            if rest in self.parameters:
                return False
            if rest in self.buffers:
                return True
            rest = rest.partition(".")[2]
        return None


def as_pattern(name: str) -> str:
    """Put `*` for every number that is a part of a name of its own."""
    return _NUMBER.sub("*", name)


def find_model_type(config: Mapping[str, Any]) -> ModelType | None:
    """Return what is known of the class that a config names, and of those of the configs in it; None if nothing."""
    table = _read_table()
    if str(config.get("model_type")) not in table["types"]:
        return None
    types = list(dict.fromkeys(_types(config, _DEPTH)))
    known = [kind for kind in types if kind in table["types"]]
    found = {kind: frozenset(n for t in known for n in table[kind].get(t, ())) for kind in ("buffers", "parameters")}
    return ModelType(types[0], **found)


def _types(config: Mapping[str, Any], depth: int) -> Iterator[str]:
    """Yield the model types of a config and of those in it, its own first."""
    if isinstance(kind := config.get("model_type"), str) and kind:
        yield kind
    if depth:
        for part in config.values():
            if isinstance(part, dict):
                yield from _types(part, depth - 1)


@cache
def _read_table() -> dict[str, Any]:
    table = json.loads(Path(__file__).with_suffix(".json").read_bytes())
    table["types"] = frozenset(table["types"].split())
    return dict(table)
