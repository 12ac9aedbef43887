"""A finder on sys.meta_path that calls something when a module has been imported, without importing it."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PRETRAINED_CLASSES = {
    "transformers.modeling_utils": "PreTrainedModel",
    "diffusers.models.modeling_utils": "ModelMixin",
}
"""The classes whose from_pretrained loads weights, by the modules that have them."""

_waiting: dict[str, list[Callable[[], None]]] = {}
"""What to call, by the modules whose import is waited for."""


def watch_import(name: str) -> None:
    """Wait for a module from now on, so that `call_after_import` may come when it is half run."""
    if name not in sys.modules:
        _waiting.setdefault(name, [])
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def call_after_import(name: str, callback: Callable[[], None]) -> None:
    """Call `callback` once module `name` has run: now, if it has already."""
    watch_import(name)
    if name in _waiting:
        _waiting[name].append(callback)
    else:
        callback()


class _Finder:
    """Lets the others find a module, and wraps its loader's exec_module."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        others = (find for one in sys.meta_path if one is not self and (find := getattr(one, "find_spec", None)))
        spec = next((spec for find in others if (spec := find(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            _wrap_exec_module(spec.loader, name)
        return spec


_FINDER = _Finder()


def _wrap_exec_module(loader: Any, name: str) -> None:
    """Shadow a loader's method until it has run this module: the loader stays what it is for all that ask."""
    run, own = loader.exec_module, vars(loader).get("exec_module")

    def exec_module(module: ModuleType) -> None:
        if module.__name__ != name:  # a loader may have several
            run(module)
            return
        if own is None:
            del loader.exec_module
        else:
            loader.exec_module = own
        run(module)
        for callback in _waiting.pop(name, ()):
            callback()

    loader.exec_module = exec_module
