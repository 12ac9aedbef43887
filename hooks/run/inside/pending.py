"""What the optimizers of a process own: which models, and which of them still wait to be seen at work."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .weakset import WeakSet


class Trained:
    """The parameters that optimizers own, by the outermost module that holds them."""

    def __init__(self) -> None:
        self.waiting = WeakSet()
        """Those of models that have not been patched."""
        self._groups: list[tuple[Any, WeakSet]] = []  # a top, weakly, and an optimizer's parameters in it

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, top: nn.Module, owned: Sequence[nn.Parameter]) -> None:
        """Take in what an optimizer owns of a model."""
        self._groups = [group for group in self._groups if group[1]]
        self._groups.append((weakref.ref(top), WeakSet(owned)))
        self.waiting.add(owned)

    def root(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> nn.Module:
        """Return the module, or what it is a fragment of: a script may call the parts of a model on their own.

        Args:
            parameters: the module's.
        """
        for reference, owned in self._groups:
            top: nn.Module | None = reference()
            if top is not None and 0 < sum(one in owned for one in parameters) < len(owned):
                return top
        return module

    def unseen(self, held: Sequence[nn.Parameter]) -> Iterator[nn.Module]:
        """Yield the models that wait, of these parameters."""
        for reference, owned in list(self._groups):
            top = reference()
            if top is not None and any(one in owned and one in self.waiting for one in held):
                yield top

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names."""
        for owned in (self.waiting, *(group[1] for group in self._groups)):
            owned.move(before, after)
