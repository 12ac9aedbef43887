"""Call something when a module has been imported, without importing it."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_waiting: dict[str, Callable[[], None]] = {}


def after(name: str, callback: Callable[[], None]) -> None:
    """Call `callback` once module `name` has run: now, if it has already."""
    if name in sys.modules:
        callback()
        return
    _waiting[name] = callback
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder:
    """Lets the others find a module, and listens to its loader."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            _listen(spec.loader, name)
        return spec


_FINDER = _Finder()


def _listen(loader: Any, name: str) -> None:
    """Shadow a loader's method by one of this one loader: it stays what it is for all that ask what it is."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        run(module)
        _waiting.pop(name)()

    loader.exec_module = exec_module
