"""A pickle module for torch.save whose Pickler leaves out the patch: files are what they would be without a run."""

import pickle
from types import ModuleType
from typing import Any

from torch import nn

from ...marks import PATCH, is_ours, marks_of
from ...weights.sources import LOADED


class _Pickler(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        if issubclass(type(thing), nn.Parameter) and LOADED in thing.__dict__:
            return _unmarked(thing)
        if not issubclass(type(thing), nn.Module) or not _is_patched(thing.__dict__):
            return NotImplemented
        return _without_marks(thing.__reduce_ex__(2))


def _unmarked(parameter: nn.Parameter) -> Any:
    """Return how to pickle a parameter without the mark that it was loaded."""
    mark = parameter.__dict__.pop(LOADED)
    try:
        function, args, *rest = parameter.__reduce_ex__(2)  # type: ignore[no-untyped-call]
        return function, tuple(dict(one) if one is parameter.__dict__ else one for one in args), *rest
    finally:
        setattr(parameter, LOADED, mark)


def _without_marks(reduced: Any) -> Any:
    """Return how to pickle a module, its state wherever it is: fx has it among the arguments of a function."""
    if type(reduced) is tuple:
        return tuple(map(_without_marks, reduced))
    return _plain(reduced) if isinstance(reduced, dict) and _is_patched(reduced) else reduced


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_post_hooks")


def _is_patched(attributes: dict[str, Any]) -> bool:
    return PATCH in attributes or bool(marks_of(attributes))


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a module's state was before it was patched."""
    plain = {name: value for name, value in state.items() if name != PATCH}
    ours = {key for name in _HOOKS for key, hook in state.get(name, {}).items() if is_ours(hook)}
    for name, value in plain.items():
        if name.startswith(("_forward_", "_load_state_dict_")) and not ours.isdisjoint(value):
            plain[name] = type(value)((key, one) for key, one in value.items() if key not in ours)
    for mark in marks_of(state):
        mark.restore(plain)
    return plain


plain_pickle = ModuleType("pickle")
"""The module pickle, but for what is ours, which it leaves out."""
plain_pickle.__dict__.update(pickle.__dict__, Pickler=_Pickler)
