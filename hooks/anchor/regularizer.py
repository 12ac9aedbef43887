"""Optimizer hooks that decay weights toward w_pre before each step of any torch optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from ..regularizer import Settings
from ..step_methods import StepRegularizer, held_weights, lr_of
from ..weights.chosen import ChosenWeights
from ..weights.pretrained import local
from .settings import Anchor


class AnchorRegularizer(StepRegularizer):
    """The decay of one model's weights: those of layers, as long as they are trainable."""

    def __init__(self, settings: Anchor, weights: ChosenWeights, others: Sequence[Settings]) -> None:  # noqa: ARG002
        super().__init__(settings.name, weights.of("layers"))
        self.settings = settings

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

    def facts(self, root: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        return {"anchored": self.steps}
