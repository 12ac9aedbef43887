"""Attributes on the modules of a patched model, by which a copy of a part of it is recognized: no patch owns those.

deepcopy and pickle take a module's attributes along. If the whole model went, its patch did as well and owns the copied
marks; if a part did, nobody would ever take them off again.
"""

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

PATCH = "_surgery_patch"
"""The attribute of a patched model that holds its patch."""


class Mark:
    """Something that a patch leaves on a module, as the attribute of that name: an orphan until a patch adopts it."""

    attribute: ClassVar[str]
    _owner: "weakref.ref[Any] | None" = None

    def adopt(self, owner: object) -> None:
        self._owner = weakref.ref(owner)

    def is_of(self, owner: object) -> bool:
        """Tell whether this patch has left it."""
        return self._owner is not None and self._owner() is owner

    @property
    def is_copy(self) -> bool:
        """It was copied or unpickled without its patch."""
        return self._owner is None

    @property
    def is_orphan(self) -> bool:
        """It is a copy, or its patch is gone with its model."""
        return self._owner is None or self._owner() is None

    def release(self, module: nn.Module) -> None:
        """Take it off a module, and undo what it stands for."""
        if module.__dict__.get(self.attribute) is self:
            self.restore(module.__dict__)

    def restore(self, attributes: MutableMapping[str, Any]) -> None:
        """Make a module's attributes, or a copy of them, what they were before it was patched."""
        attributes.pop(self.attribute, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}


@dataclass(frozen=True)
class Marked:
    """The handle of a mark: takes it off its module again."""

    module: nn.Module
    mark: Mark

    def remove(self) -> None:
        self.mark.release(self.module)


class Part(Mark):
    """Says that a module holds a weight which a patch acts on."""

    attribute = "_surgery_part"


def put(module: nn.Module, mark: Mark) -> Marked:
    """Leave a mark on a module; return its handle."""
    module.__dict__[mark.attribute] = mark
    return Marked(module, mark)


def marks_of(attributes: MutableMapping[str, Any]) -> list[Mark]:
    """Return the marks among a module's attributes, or a copy of them."""
    return [value for value in attributes.values() if isinstance(value, Mark)]


def is_ours(hook: Any) -> bool:
    """Tell a hook of this package."""
    return str(getattr(hook, "__module__", "")).startswith(f"{__package__}.")


def find_orphans(root: nn.Module) -> list[nn.Module]:
    """Return the modules that bear the mark of a patch which is in no model any more."""
    return [module for module in root.modules() if any(mark.is_orphan for mark in marks_of(module.__dict__))]


def release(module: nn.Module) -> None:
    """Take our marks and hooks off a module."""
    for mark in marks_of(module.__dict__):
        mark.release(module)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
