"""Whether load_state_dict brought pretrained weights or resumed a run, and the weights that it has overwritten."""

import weakref
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from surgery.live.foreign import is_zero3_shard

from ...weights.sources import LOADED, is_loaded
from .snapshots import Snapshots
from .weakset import WeakSet


class Loads:
    """What was loaded into models that are not regularized yet."""

    def __init__(self) -> None:
        self.filled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Modules that a first load has filled."""
        self.pretrained: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Whole modules of pretrained weights: those, and what from_pretrained has made."""
        self.overwritten = Snapshots()
        """The pretrained weights that a later load has written over."""
        self.without_noise = WeakSet()
        """What was loaded, as pretrained, after an optimizer had been made."""
        self._undecided = WeakSet()  # loaded into what an optimizer has: pretrained, or a run that is resumed
        self._resumed = WeakSet()

    def before_load(
        self, parameters: Mapping[str, nn.Parameter], touched: Sequence[nn.Parameter], pending: WeakSet
    ) -> None:
        """Keep what a load is about to overwrite, where that is pretrained.

        Args:
            parameters: of the module that is loaded into.
            touched: those that it overwrites, of models that are not regularized yet.
            pending: what an optimizer has: its values are pretrained if the optimizer is resumed.
        """
        if any(map(is_loaded, parameters.values())):
            self.treat_as_pretrained(touched)
            self.overwritten.keep(touched)
        elif pending.has_any(parameters.values()):
            self.overwritten.keep(touched)
            self._undecided.add(touched)

    def treat_as_pretrained(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take it that what a load brought to an optimizer's parameters was pretrained, and no resumed run's."""
        late = [parameter for parameter in parameters if parameter in self._undecided]
        self._undecided.remove(late)
        self.overwritten.drop(late)
        self.without_noise.add(late)

    def after_load(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], names: Sequence[str]) -> None:
        """Mark what the first load has filled, as pretrained; forget one that has changed nothing."""
        touched = [parameters[name] for name in names if name in parameters]
        self.overwritten.drop_equal(touched)
        if not any(map(is_loaded, parameters.values())):
            self.filled.add(module)
            self.pretrained.add(module)
            for parameter in touched:
                setattr(parameter, LOADED, True)

    def on_optimizer_state_loaded(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note that the optimizer of these goes on: whatever they are, they had noise before.

        That of ZeRO-3 is about to write over the shares of pretrained weights, which no load_state_dict has done yet.
        """
        resumed = list(parameters)
        self._resumed.add(resumed)
        if any(map(is_loaded, resumed)):
            self.overwritten.keep(one for one in resumed if is_zero3_shard(one))

    def is_pretrained_unknown(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Tell whether a run is resumed, and what these were before it cannot be told."""
        return self.is_resumed(parameters) and not self.overwritten.has(parameters)

    def is_resumed(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Tell whether an optimizer goes on with these."""
        return self._resumed.has_any(parameters)

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names."""
        for follower in (self.overwritten, self.without_noise, self._undecided, self._resumed):
            follower.move(before, after)
