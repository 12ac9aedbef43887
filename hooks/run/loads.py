"""What load_state_dict does to the models of a process: it brings pretrained weights, or it resumes a run."""

import weakref
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..sources import LOADED, is_loaded
from .past import Past
from .weak import WeakSet


class Loads:
    """What was loaded into models that are not regularized yet."""

    def __init__(self) -> None:
        self.filled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Modules that a first load has filled."""
        self.overwritten = Past()
        """The pretrained weights that a later load has written over."""
        self._resumed = WeakSet()

    def keep(self, parameters: Mapping[str, nn.Parameter], touched: Iterable[nn.Parameter], waiting: WeakSet) -> None:
        """Keep what a load is about to overwrite, where that is pretrained.

        Args:
            parameters: of the module that is loaded into.
            waiting: what an optimizer has: its values count as pretrained.
        """
        if any(is_loaded(parameter) or parameter in waiting for parameter in parameters.values()):
            self.overwritten.keep(touched)

    def mark(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], names: Sequence[str]) -> None:
        """Mark what the first load has filled, as pretrained; forget one that has changed nothing."""
        touched = [parameters[name] for name in names if name in parameters]
        self.overwritten.drop_equal(touched)
        if not any(map(is_loaded, parameters.values())):
            self.filled.add(module)
            for parameter in touched:
                setattr(parameter, LOADED, True)

    def resume(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note that the optimizer of these goes on: whatever they are, they had noise before."""
        self._resumed.add(parameters)

    def is_blind(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Tell whether a run is resumed, and what these were before it cannot be told."""
        return self._resumed.has_any(parameters) and not self.overwritten.has(parameters)

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names."""
        self.overwritten.move(before, after)
        self._resumed.move(before, after)
