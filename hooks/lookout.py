"""Watch for optimizer steps of a model that was never put in training mode: Mixout would do nothing, in silence."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import Optimizer

from .optimizers import watch

if TYPE_CHECKING:
    from .mixout import Site

_log = logging.getLogger(__name__)


class Lookout:
    """Counts the optimizer steps of one model's weights until the first of them is mixed.

    Args:
        sites: the weights.
    """

    def __init__(self, sites: "Sequence[Site]") -> None:
        self.steps = 0
        """Optimizer steps without any Mixout."""
        self._sites = sites

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Wait: a closure may run the first forward."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Warn of the first step that was taken without Mixout."""
        if any(site.is_called for site in self._sites):
            self.steps = 0
            return
        held = {id(w) for group in optimizer.param_groups for w in group["params"] if w.requires_grad}
        # not site.weight, which raises where another tool has taken it away, and this step may be another model's
        if not any(id(site.target.owners[0]._parameters.get("weight")) in held for site in self._sites):
            return
        if self.steps == 0:
            _log.warning(
                "mixout: expected a forward in training mode before an optimizer's step, got none: nothing is mixed. "
                "Call model.train(): from_pretrained leaves a model in eval mode."
            )
        self.steps += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete a copy, in a copy of the model."""
        self.__dict__.update(state)
        watch(self)
