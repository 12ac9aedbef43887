"""Find the state_dict in what torch.load returns: nests of training frameworks, and what in them is no tensor.

A checkpoint of weights holds tensors by name and nothing else. Anything else is refused where weights may be in it, and
named in a warning where not; of several state_dicts none is guessed.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from surgery.errors import SourceError, some
from surgery.escapes import get_logger

_log = get_logger(__name__)

_NESTS = ("state_dict", "model_state_dict", "model", "module")
"""Names under which training frameworks keep the model beside training state."""
_TRAINING = re.compile(
    r"(?:.*[^a-z])?(?:optim(?:i[sz]ers?|[a-z])?|(?:lr_?)?sched(?:ulers?|s)?|(?:grad_?)?scalers?|callbacks?|loops?|hparams|"
    r"hyper_param\w*|param_groups|rng|random_(?:rng_)?states?|amp_scaling)(?:[^a-z].*)?",
    re.IGNORECASE,
)
"""Names of training state, by whole words: an `optimal_transport` or a `random_projection` may be a model's."""
_DEPTH = 8
_LEVELS = 3  # of nests within a nest that are looked into to tell whether there are tensors
_ALIKE = 0.5  # of its names that another state_dict shares: another copy of the same model
_CHOOSE = "Choose one with `key`, or save it by itself with torch.save."


def find_state_dict(loaded: Any, label: str, *, key: str | None = None) -> dict[str, torch.Tensor]:
    """Return the one state_dict there is, or that of a name.

    Args:
        key: its name in the nest that holds it, at any depth; what reads like training state may be meant too.
    Raises:
        SourceError: none, several or none of that name, or weights in it that are no tensors.
    """
    if key is not None:
        loaded = _take(loaded, key, label)
    for _ in range(_DEPTH):  # a pickle may hold itself
        nests = _nests(loaded)
        if not nests:
            break
        loaded = loaded[_choose(loaded, nests, label)]
    if not _has_tensors(loaded):
        raise SourceError(f"{label}: expected a state_dict, got {_describe(loaded)}. Save one with torch.save.")
    return dict(_tensors(loaded, label))


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values())


def _nests(loaded: Any) -> dict[str, set[str]]:
    """Return the names of what holds state_dicts, with the names of the tensors in each."""
    return {name: names for name, names in _holders(loaded).items() if not _TRAINING.fullmatch(name)}


def _holders(loaded: Any) -> dict[str, set[str]]:
    """Return these, and training state that holds tensors too."""
    if not isinstance(loaded, Mapping):
        return {}
    nests = {
        name: _names_in(value, _LEVELS)
        for name, value in loaded.items()
        if isinstance(name, str) and isinstance(value, Mapping)
    }
    return {name: names for name, names in nests.items() if names}


def _names_in(value: Mapping[Any, Any], depth: int) -> set[str]:
    """Return the names of the tensors in a nest, or else in those within it."""
    names = {name for name, item in value.items() if isinstance(name, str) and isinstance(item, torch.Tensor)}
    if names or not depth:
        return names
    within = (_names_in(item, depth - 1) for item in value.values() if isinstance(item, Mapping))
    return set[str]().union(*within)


def _take(loaded: Any, key: str, label: str) -> Any:
    """Return what is kept under a name, at the least depth where there is one."""
    level: dict[str, Any] = {"": loaded}
    seen: dict[str, None] = {}
    entered: set[int] = set()  # a pickle may hold itself
    while level:
        if found := {where: nest for where, nest in level.items() if key in _holders(nest)}:
            return _take_one(found, key, label)
        seen |= {name: None for nest in level.values() for name in _holders(nest)}
        entered |= {id(nest) for nest in level.values()}
        below = {f"{where}{name}.": nest[name] for where, nest in level.items() for name in _nests(nest)}
        once = {id(nest): where for where, nest in below.items() if id(nest) not in entered}
        level = {where: below[where] for where in once.values()}
    if not seen:
        raise SourceError(f"{label}: expected a state_dict {key!r}, got no names of any. Leave `key` out.")
    raise SourceError(f"{label}: expected a state_dict {key!r}, got {_list(seen)}. Choose one of them with `key`.")


def _take_one(found: Mapping[str, Mapping[str, Any]], key: str, label: str) -> Any:
    if len(found) > 1:
        places = _list([where.removesuffix(".") for where in found])
        raise SourceError(
            f"{label}: expected one state_dict {key!r}, got one in each of {places}. "
            "Save the one to take by itself with torch.save."
        )
    nest = next(iter(found.values()))
    _warn_of_others(key, [name for name in _nests(nest) if name != key], _beside(nest), label)
    return nest[key]


def _choose(loaded: Mapping[str, Any], nests: Mapping[str, set[str]], label: str) -> str:
    """Choose the nest that holds the model, if that is certain."""
    known = [name for name in _NESTS if name in nests]
    chosen = known[0] if known else next(iter(nests))
    others = [name for name in nests if name != chosen]
    if others and (len(known) != 1 or any(_are_alike(nests[chosen], nests[name]) for name in others)):
        raise SourceError(f"{label}: expected one state_dict, got {len(nests)}: {_list(nests)}. {_CHOOSE}")
    beside = _beside(loaded)
    if beside and not known:
        raise SourceError(
            f"{label}: expected one state_dict, got {chosen!r} with tensors beside it: {_list(beside)}. {_CHOOSE}"
        )
    _warn_of_others(chosen, others, beside, label)
    return chosen


def _beside(loaded: Mapping[str, Any]) -> list[str]:
    """Name the tensors beside state_dicts; a number is a counter."""
    return [name for name, value in loaded.items() if isinstance(value, torch.Tensor) and value.numel() > 1]


def _warn_of_others(chosen: str, others: list[str], beside: list[str], label: str) -> None:
    if left_out := [*others, *beside]:
        _warn_once(f"{label}: took the state_dict {chosen!r}, and left out what is beside it: {_list(left_out)}")


def _are_alike(one: set[str], other: set[str]) -> bool:
    return len(one & other) > _ALIKE * min(len(one), len(other))


def _tensors(state_dict: Mapping[Any, Any], label: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors, and refuse or name what is none."""
    left_out = []
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise SourceError(f"{label}: expected names that are text, got {name!r:.60}. Save a state_dict.")
        if isinstance(value, torch.Tensor):
            _refuse_name(name, label)
            yield name, value
        elif _holds_tensors(value):
            _refuse_container(name, value, label)
        else:
            left_out.append(f"{name!r} ({_kind(value)})")
    if left_out:
        _warn_once(f"{label}: left out {len(left_out)} that are no tensors: {some(left_out)}")


def _refuse_name(name: str, label: str) -> None:
    """Refuse what safetensors cannot write, and the one parameter into which FSDP 1 flattens many."""
    if name == "__metadata__" or any("\ud800" <= character <= "\udfff" for character in name):
        raise SourceError(f"{label}: {name!r:.60}: expected a name that safetensors can hold, got this. Rename it.")
    if name.rpartition(".")[2] in ("_flat_param", "flat_param"):
        raise SourceError(
            f"{label}: {name!r}: expected a model's own weights, got those that FSDP has flattened. "
            "Save them with FULL_STATE_DICT."
        )


def _holds_tensors(value: Any, depth: int = _LEVELS) -> bool:
    """Tell whether weights may be in a value: tensors, or what torch packs them in."""
    if isinstance(value, torch.Tensor | torch.ScriptObject):
        return True
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return depth > 0 and any(_holds_tensors(item, depth - 1) for item in items)


def _refuse_container(name: str, value: Any, label: str) -> None:
    if "_packed_params" in name:
        raise SourceError(
            f"{label}: {name!r}: expected unquantized weights, got packed ones. "
            "Perturb the original checkpoint and quantize the result."
        )
    raise SourceError(f"{label}: {name!r}: expected a tensor, got a {_kind(value)} of tensors. Save tensors by name.")


def _describe(loaded: Any) -> str:
    if not isinstance(loaded, Mapping):
        return f"an object of type {_kind(loaded)}"
    return f"a {_kind(loaded)} of {_list(loaded)}" if loaded else f"an empty {_kind(loaded)}"


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _list(names: Any) -> str:
    shown = [f"{name!r:.60}" for name in list(names)[:6]]
    return ", ".join(shown) + (", ..." if len(names) > 6 else "")


@cache
def _warn_once(message: str) -> None:
    """Warn: a file is opened several times in a run."""
    _log.warning("%s", message)
