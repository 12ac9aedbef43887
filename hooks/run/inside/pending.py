"""class Pending: parameters of optimizers whose model has not been called yet, and so is not patched."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .weakset import WeakSet


@dataclass(frozen=True)
class _Group:
    """What one optimizer owns of a model.

    Args:
        top: the outermost module that holds it, weakly.
        owned: the parameters.
    """

    top: "weakref.ref[nn.Module]"
    owned: WeakSet


class Pending:
    """The parameters that optimizers own, by the outermost module that holds them."""

    def __init__(self) -> None:
        self.parameters = WeakSet()
        """Those of models that have not been patched."""
        self._groups: list[_Group] = []

    def add(self, top: nn.Module, owned: Sequence[nn.Parameter]) -> None:
        """Take in what an optimizer owns of a model."""
        self._groups = [group for group in self._groups if group.owned]
        self._groups.append(_Group(weakref.ref(top), WeakSet(owned)))
        self.parameters.add(owned)

    def find_whole(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> nn.Module:
        """Return the module, or what it is a fragment of: a script may call the parts of a model on their own.

        Args:
            parameters: the module's.
        """
        for group in self._groups:
            top = group.top()
            if top is not None and 0 < sum(one in group.owned for one in parameters) < len(group.owned):
                return top
        return module

    def models_of(self, held: Sequence[torch.Tensor]) -> Iterator[nn.Module]:
        """Yield the models that have not been patched, of these parameters."""
        for group in list(self._groups):
            top = group.top()
            if top is not None and any(one in group.owned and one in self.parameters for one in held):
                yield top

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names."""
        for owned in (self.parameters, *(group.owned for group in self._groups)):
            owned.move(before, after)
