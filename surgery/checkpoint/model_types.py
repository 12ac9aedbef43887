"""model_types.json: which tensors of transformers' and diffusers' models are buffers or tied, from their classes.

tests/make_model_types.py makes the file from what is installed. A name in it has `*` for every number, and
stands for all names that end in it, since checkpoints are written with and without a base model's prefix.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A number that is a part of a name of its own."""
_SLOT = re.compile(r"(?<![^.])(?:\d+|\*)(?![^.])")
_AUTO_HEAD = re.compile(r"For(CausalLM|MaskedLM|TokenClassification|MultipleChoice)$")
"""Heads that an Auto class has for every model type whose class has it, whatever that is named."""
_DEPTH = 4  # configs within configs
_MOST_PARTS = 32  # of a name's end: more than any in the table, and a hostile name may have a million


@dataclass(frozen=True)
class ModelType:
    """What is known of the classes that a config names.

    Args:
        buffers: names of buffers.
        parameters: names of parameters that the rules for unknown classes, or the names of buffers, take for buffers.
        ties: names of tied weights, and those of the tensors that they may repeat, of which a class has one. A number
            in the latter stands for itself, a `*` for the number at the same place in the former.
        is_tied: whether the config has them tied.
    """

    name: str
    buffers: frozenset[str]
    parameters: frozenset[str]
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_tied: bool = True

    def is_buffer(self, name: str) -> bool | None:
        """Tell what a tensor is; None if it is not among the names. The longest name that it ends in decides."""
        for ending in _endings(as_pattern(name)) if self.buffers or self.parameters else ():
            if ending in self.parameters:
                return False
            if ending in self.buffers:
                return True
        return None

    def find_ties(self, names: Collection[str], targets: Iterable[str] | None = None) -> dict[str, str]:
        """Find which of the names, or of the targets, stand for another one of the names.

        Args:
            names: of all tensors of one model.
            targets: names that may not be among them, as of a tied weight that is not stored.
        Returns:
            For each that does, the name of the tensor that it repeats.
        """
        found = {}
        for name in (names if targets is None else targets) if self.ties else ():
            if source := next(iter(self._sources(name, names)), None):
                found[name] = source
        return {name: found.get(source, source) for name, source in found.items()}

    def _sources(self, name: str, names: Collection[str]) -> Iterator[str]:
        """Yield the tensors that a name may repeat, those of its longest known ending first."""
        for ending in _endings(name):
            path = name.removesuffix(ending).removesuffix(".")
            for template in self.ties.get(as_pattern(ending), ()):
                source = _fill(template, NUMBER.findall(ending))
                alike = [n for n in names if n != name and (n == source or n.endswith(f".{source}"))]
                within = [n for n in alike if path and n.startswith(f"{path}.")]
                yield from within[:1] or (alike if len(alike) == 1 else ())


def _fill(template: str, numbers: Sequence[str]) -> str:
    """Put a target's numbers for the stars of its source."""
    slots = iter(numbers)
    return _SLOT.sub(lambda slot: number if (number := next(slots, "")) and slot[0] == "*" else slot[0], template)


def _endings(pattern: str) -> Iterator[str]:
    """Yield what a name ends in, by its parts, the longest first."""
    parts = pattern.rsplit(".", _MOST_PARTS)[-_MOST_PARTS:]
    return (".".join(parts[start:]) for start in range(len(parts)))


def as_pattern(name: str) -> str:
    """Put `*` for every number that is a part of a name of its own."""
    return NUMBER.sub("*", name)


def find_model_type(config: Mapping[str, Any]) -> ModelType | None:
    """Return what is known of the class that a config names, and of those of the configs in it; None if nothing.

    A config without a model type may name its class in `architectures`, or in `_class_name` as those of diffusers do.
    """
    table = _read_table()
    own = config.get("model_type") or table["classes"].get(_first(config.get("architectures")))
    own = own or config.get("_class_name")
    if not isinstance(own, str) or own not in table["types"]:
        return None
    types = list(dict.fromkeys([own, *_types(config, _DEPTH)]))
    known = [kind for kind in types if kind in table["types"]]
    found = {kind: frozenset(n for t in known for n in table[kind].get(t, ())) for kind in ("buffers", "parameters")}
    ties: dict[str, tuple[str, ...]] = {}
    for kind in known:
        for target, sources in table["ties"].get(kind, {}).items():
            ties[target] = (*ties.get(target, ()), *sources.split())
    return ModelType(own, **found, ties=ties, is_tied=_is_tied(config, own not in table["untied"]))


def find_class(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the library and the class that load what a config is of; None if it is none that is known.

    Transformers' own classes are loaded as such: its Auto classes know some by other heads, and some not at all.
    """
    table = _read_table()
    own, name = config.get("model_type"), _first(config.get("architectures"))
    if "_diffusers_version" in config:
        own = config.get("_class_name")
        return ("diffusers", own) if isinstance(own, str) and own in table["types"] else None
    if name in table["classes"]:
        return "transformers", name
    head = "" if name is None else _AUTO_HEAD.search(name)
    if head is None or not isinstance(own, str) or own not in table["types"]:
        return None
    return "transformers", f"AutoModel{head and head[0]}"


def _first(names: Any) -> Any:
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else None


def _types(config: Mapping[str, Any], depth: int) -> Iterator[str]:
    """Yield the model types of a config and of those in it, its own first."""
    if isinstance(kind := config.get("model_type"), str) and kind:
        yield kind
    if depth:
        for part in config.values():
            if isinstance(part, dict):
                yield from _types(part, depth - 1)


def _is_tied(config: Mapping[str, Any], default: bool) -> bool:
    """Tell whether a config has tied weights: a word of its own before one of the configs in it."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    said = [part["tie_word_embeddings"] for part in parts if isinstance(part.get("tie_word_embeddings"), bool)]
    return said[0] if said else default


@cache
def _read_table() -> dict[str, Any]:
    table = json.loads(Path(__file__).with_suffix(".json").read_bytes())
    classes = {name: kind for kind, names in table["classes"].items() for name in names.split()}
    sets = {name: frozenset(table[name].split()) for name in ("types", "untied")}
    return dict(table) | sets | {"classes": classes}
