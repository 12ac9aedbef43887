"""gc.get_objects() searched for the modules that hold given parameters: torch has no list of a process's modules."""

import gc
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery.live.parts import unwrap
from surgery.live.zero3 import size_of


def find_tops(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return the outermost modules that hold some of the parameters, each with those that it holds.

    A model in several wrappers, such as two losses, counts as in the smallest of them. A parameter that is in no module
    is left out.
    """
    holders = _holders()
    tops: dict[int, tuple[nn.Module, list[nn.Parameter]]] = {}
    for parameter in parameters:
        if found := _climb(parameter, holders):
            top = unwrap(min(found, key=_size) if len(found) > 1 else found[0])
            tops.setdefault(id(top), (top, []))[1].append(parameter)
    return list(tops.values())


def find_gradients() -> dict[int, tuple[nn.Parameter, int, int]]:
    """Return the parameters that have a gradient, by id, each with what changes when a backward pass adds to it."""
    gc.collect()  # layers of a model that is gone have each other, and gradients
    things = (thing for thing in gc.get_objects() if issubclass(type(thing), nn.Parameter))
    return {id(w): (w, id(w.grad), w.grad._version) for w in things if w.requires_grad and w.grad is not None}


_HEAD = 0.1
"""Of the elements of a pretrained body: a model with more may be a student beside its teacher."""


def is_small_beside(new: Iterable[nn.Parameter], body: Iterable[nn.Parameter]) -> bool:
    """Tell whether new parameters are few enough to be a head on pretrained ones."""
    return sum(map(size_of, new)) < _HEAD * sum(map(size_of, body))


def _size(module: nn.Module) -> int:
    return sum(1 for _ in module.modules())


def find_modules(function: Any, values: Iterable[Any]) -> list[nn.Module]:
    """Return the modules that a function is handed, closes over, or names in its globals or its own object."""
    function = inspect.unwrap(function)
    known = [*values, getattr(function, "__self__", None)]
    known += vars(known[-1]).values() if hasattr(known[-1], "__dict__") else ()
    plain = getattr(function, "__func__", function)
    if inspect.isfunction(plain):
        seen = inspect.getclosurevars(plain)
        known += [*seen.nonlocals.values(), *seen.globals.values()]
    return [one for one in known if isinstance(one, nn.Module)]


def _holders() -> dict[int, list[nn.Module]]:
    """Return the modules that hold a parameter or a module directly, by its id."""
    is_module: dict[type, bool] = {}
    holders: dict[int, list[nn.Module]] = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in is_module:
            is_module[kind] = issubclass(kind, nn.Module)  # not isinstance, which asks lazy things for their __class__
        if is_module[kind]:
            held = [*thing.__dict__.get("_parameters", {}).values(), *thing.__dict__.get("_modules", {}).values()]
            for one in {id(one) for one in held if one is not None}:
                holders.setdefault(one, []).append(thing)
    return holders


def _climb(parameter: nn.Parameter, holders: dict[int, list[nn.Module]]) -> list[nn.Module]:
    """Return the modules above a parameter that are in no other."""
    seen: dict[int, nn.Module] = {}
    above = list(holders.get(id(parameter), ()))
    while above:
        module = above.pop()
        if id(module) not in seen:
            seen[id(module)] = module
            above += holders.get(id(module), ())
    return [module for key, module in seen.items() if key not in holders]
