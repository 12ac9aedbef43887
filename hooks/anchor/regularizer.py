"""Decay toward w_pre before every optimizer step, whatever the optimizer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer

from surgery.errors import SettingError, SourceError

from ..steps import StepWatch, watch
from ..weights.pretrained import local

if TYPE_CHECKING:
    from ..mixout.site import Site


class Decay:
    """The decay of one model's weights.

    Args:
        weight: per unit of lr.
        sites: the weights, with their w_pre.
    """

    def __init__(self, weight: float, sites: "Sequence[Site]") -> None:
        self.weight = weight
        self.steps = 0
        """Optimizer steps that it acted in."""
        self._sites = sites
        self._open_step: int | None = None
        self._watch = StepWatch()

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Decay the weights that this optimizer holds."""
        # an optimizer that wraps another has both of them step; the one that is open may have raised, and step again
        if self._open_step in (None, id(optimizer)) and self._decay(optimizer, is_closure):
            self._open_step = id(optimizer)

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:  # noqa: ARG002
        """Close the step."""
        if self._open_step == id(optimizer):
            self._open_step = None

    def _decay(self, optimizer: Optimizer, is_closure: bool) -> bool:
        """Take w toward w_pre by lr * weight of the distance, where the step has a gradient for w, as AdamW does.

        A closure brings the gradients later: all trainable weights are decayed then. One that is never trained is at
        w_pre, and stays there.

        Returns:
            Whether the optimizer holds such a weight.
        """
        if getattr(optimizer, "found_inf", None):  # a fused optimizer skips by itself the step that GradScaler refuses
            return False
        sites = {id(site.weight): site for site in self._sites}
        is_ours = False
        for group in optimizer.param_groups:
            for w in group["params"]:
                has_grad = w.grad is not None or (is_closure and w.requires_grad)
                if has_grad and (site := sites.get(id(w))) is not None:
                    local(w).lerp_(site.ready(w).part(w), _lr(group, optimizer) * self.weight)
                    is_ours = True
        self.steps += is_ours
        return is_ours

    def refuse_missed(self) -> None:
        """Raise where weights change with no optimizer step of torch that could have anchored them.

        Called at every forward pass in training.
        """
        site = next((site for site in self._sites if site.weight.requires_grad), None)
        if site is None or self._open_step is not None:  # a closure, such as LBFGS's, amid the step
            return
        if self._watch.is_missed(site.weight, self.steps):
            raise SourceError(
                f"anchor: expected a step of a torch.optim.Optimizer that holds {site.name}, got weights that change "
                "without one. Use such an optimizer, built from the model's own parameters."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete a copy, in a copy of the model: its weights are anchored as well."""
        self.__dict__.update(state)
        watch(self)


def _lr(group: dict[str, Any], optimizer: Optimizer) -> float:
    lr = group.get("lr")
    if lr is None:
        raise SettingError(
            f"anchor: expected an optimizer with an lr, got {type(optimizer).__name__} with lr=None. "
            "Give it an lr: the decay is lr * weight."
        )
    return float(lr)
