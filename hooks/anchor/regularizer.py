"""Optimizer hooks that decay weights toward w_pre before each step of any torch optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from ..regularizer import Regularizer, Settings
from ..steps import OpenStep, StepWatch, held_weights, lr_of
from ..weights.chosen import ChosenWeights
from ..weights.pretrained import local
from .settings import Anchor


class AnchorRegularizer(Regularizer):
    """The decay of one model's weights: those of layers, as long as they are trainable."""

    def __init__(self, settings: Anchor, weights: ChosenWeights, others: Sequence[Settings]) -> None:  # noqa: ARG002
        self.settings = settings
        self.steps = 0
        """Optimizer steps that it acted in."""
        self._tracked = weights.of("layers")
        self._open_step = OpenStep()
        self._watch = StepWatch()

    def begin_forward(self, root: nn.Module) -> None:
        """Raise where weights change with no optimizer step of torch that could have anchored them."""
        if not root.training or torch.compiler.is_compiling():
            return
        tracked = next((tracked for tracked in self._tracked if tracked.weight.requires_grad), None)
        if tracked is not None and not self._open_step.is_open:  # else a closure, such as LBFGS's, is amid the step
            self._watch.refuse_missed("anchor", tracked.name, tracked.weight, self.steps)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Take w toward w_pre by lr * weight of the distance, where the step has a gradient for w, as AdamW does.

        A closure brings the gradients later: all trainable weights are decayed then. One that is never trained is at
        w_pre, and stays there.
        """
        if getattr(optimizer, "found_inf", None):  # a fused optimizer skips by itself the step that GradScaler refuses
            return
        held = list(held_weights(optimizer, self._tracked, is_closure=is_closure))
        if not held or not self._open_step.enter(optimizer):
            return
        for group, tracked, w in held:
            lr = lr_of("anchor", optimizer, group, "the decay is lr * weight")
            local(w).lerp_(tracked.ready(w).part(w), lr * self.settings.weight)
        self.steps += 1

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:  # noqa: ARG002
        self._open_step.leave(optimizer)

    @property
    def has_acted(self) -> bool:
        return self.steps > 0

    def facts(self, root: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        return {"anchored": self.steps}
