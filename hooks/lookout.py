"""Notice optimizer steps that a regularizer has no part in: a model in eval mode would train without it, in silence."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.optim.optimizer import Optimizer

from surgery.errors import SourceError

from .steps import about_to_change, watch

if TYPE_CHECKING:
    from .mixout.site import Pass, Site

_log = logging.getLogger(__name__)


class Lookout(ABC):
    """Compares the steps of a model's optimizers with what its regularizer does: each may step once for each act."""

    idle: ClassVar[str]
    """What to say of a step without an act."""
    is_strict: ClassVar[bool]
    """A step before the first act is refused; else it is warned of, as one after it is."""

    def __init__(self) -> None:
        self.missed = 0
        """Optimizer steps without an act."""
        self._seen: Any = None
        self._served: set[int] = set()

    @abstractmethod
    def acts(self) -> Any:
        """Return what changes with each act; something false as long as there was none, None if nobody can tell."""

    @abstractmethod
    def held(self, optimizer: Optimizer) -> Iterator[torch.Tensor]:
        """Yield the model's weights that an optimizer is about to change."""

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Look at a step; what a closure does is seen after it."""
        if not is_closure:
            self._look(optimizer)

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Look at a step with a closure."""
        if is_closure:
            self._look(optimizer)

    def _look(self, optimizer: Optimizer) -> None:
        """Raise, or warn once and count, where there was no act since this optimizer's last step."""
        acts = self.acts()
        if acts is None or next(self.held(optimizer), None) is None:
            return
        if acts != self._seen:
            self._seen = acts
            self._served.clear()
        if acts and id(optimizer) not in self._served:  # one that steps beside another
            self._served.add(id(optimizer))
            return
        if not _has_gradient(list(self.held(optimizer))):
            return
        if self.is_strict and not acts:
            raise SourceError(self.idle)
        if not self.missed:
            _log.warning("%s", self.idle)
        self.missed += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete a copy, in a copy of the model: its steps are watched as well."""
        self.__dict__.update(state)
        watch(self)


def _has_gradient(weights: Collection[torch.Tensor]) -> bool:
    """Tell whether a gradient is not 0, as all are where somebody only wants an optimizer's state made."""
    if any(w.is_cuda for w in weights) and torch.cuda.is_current_stream_capturing():  # where nothing can be read
        return False
    return any(bool(w.grad.any()) for w in weights if w.grad is not None)


class MixoutLookout(Lookout):
    """The Lookout of Mixout.

    Args:
        sites: the weights.
        forward: what the sites share.
    """

    idle = (
        "mixout: expected a forward in training mode before an optimizer's step, got none: nothing is mixed. "
        "Call model.train(): from_pretrained leaves a model in eval mode, and so does an evaluation."
    )
    is_strict = False

    def __init__(self, sites: "Sequence[Site]", forward: "Pass") -> None:
        super().__init__()
        self._sites = sites
        self._forward = forward

    def acts(self) -> tuple[int, ...] | None:
        """Return what changes with each forward that mixes, without a wait for the GPU."""
        forward = self._forward
        if forward.is_hidden:
            return None
        if not any(site.is_called for site in self._sites):
            return ()
        # a compiled layer may be called by a forward that is not
        eager = forward.eager if any(site.is_traced for site in self._sites) else 0
        return forward.calls, eager, id(forward.traced), forward.traced._version

    def held(self, optimizer: Optimizer) -> Iterator[torch.Tensor]:
        # not site.weight, which raises where another tool has taken it away, and this step may be another model's
        return about_to_change(optimizer, (site.target.owners[0]._parameters.get("weight") for site in self._sites))
