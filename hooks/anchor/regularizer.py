"""Optimizer hooks that decay weights toward w_pre before each step of any torch optimizer, or hooks on gradients."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from ..regularizer import Handle, Settings
from ..step_methods import StepRegularizer, held_weights, lr_of
from ..stepped import Stepped, find_stepped
from ..weights.chosen import ChosenWeights
from ..weights.lora import LoraWeight
from ..weights.pretrained import is_distributed
from ..weights.tracked import Tracked
from .lora import decay
from .settings import Anchor


class AnchorRegularizer(StepRegularizer):
    """The decay of one model's weights: those of layers, as long as they are trainable."""

    def __init__(self, settings: Anchor, weights: ChosenWeights, others: Sequence[Settings]) -> None:  # noqa: ARG002
        super().__init__(settings.name, weights.of("layers"))
        self.settings = settings
        self._lora = weights.lora
        self._pulls: Counter[str] = Counter()
        self._pulling: dict[int, Handle] = {}  # by the id of the weight

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Take w toward w_pre by lr * weight of the distance, where the step has a gradient for w, as AdamW does.

        A closure brings the gradients later: all trainable weights are decayed then. One that is never trained is at
        w_pre, and stays there.
        """
        if getattr(optimizer, "found_inf", None):  # a fused optimizer skips by itself the step that GradScaler refuses
            return
        held = list(held_weights(optimizer, self._tracked, is_closure=is_closure))
        factors = self._held_factors(optimizer, is_closure=is_closure)
        if not (held or factors) or not self._open_step.enter(optimizer):
            return
        while self._pulling:
            self._pulling.popitem()[1].remove()
        for tracked, one in held:
            one.values.lerp_(one.w_pre(tracked.ready(one.w)), self._rate(optimizer, one.group))
        for lora, rates in factors.items():
            lora.refuse_merged()
            decay(lora, rates)
        self.steps += self._count.is_another([*(one for _, one in held), *chain(*factors.values())])

    def _rate(self, optimizer: Optimizer, group: dict[str, Any]) -> float:
        return lr_of("anchor", optimizer, group, "the decay is lr * weight") * self.settings.weight

    def _held_factors(self, optimizer: Optimizer, *, is_closure: bool) -> dict[LoraWeight, dict[Stepped, float]]:
        """Return the factors that a step changes with their rates, by the weight that LoRA makes of them."""
        known = {id(w): one for one in self._lora for w in one.parameters}
        found: dict[LoraWeight, dict[Stepped, float]] = {}
        for stepped in find_stepped(optimizer, is_closure=is_closure) if known else ():
            if (one := known.get(id(stepped.w))) is not None:
                found.setdefault(one, {})[stepped] = self._rate(optimizer, stepped.group)
        return found

    def trainable(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the trainable weights, and the factors of those that LoRA trains."""
        yield from super().trainable()
        yield from ((one.name, w) for one in self._lora for w in one.parameters)

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:  # noqa: ARG002
        self._open_step.leave(optimizer)

    def act_on_gradients(self) -> list[Handle]:
        """Add weight * (w - w_pre), the gradient of the penalty, to each gradient that comes to w.

        The loop's own rule makes a step of it, with its own lr; backward passes that add up each bring it once. LoRA's
        factors stay a matter of steps, whose absence is an error.
        """
        weights = [one for one in self._tracked if one.weight.requires_grad]
        if self._lora or any(type(one.weight) is not nn.Parameter or is_distributed(one.weight) for one in weights):
            return []
        self.is_watching = False
        new = {id(one.weight): one for one in weights if id(one.weight) not in self._pulling}
        hooks = {
            key: one.weight.register_hook(partial(self._pull, one))  # type: ignore[no-untyped-call]
            for key, one in new.items()
        }
        self._pulling |= hooks
        return list(hooks.values())

    @torch.no_grad()
    def _pull(self, tracked: Tracked, grad: torch.Tensor) -> torch.Tensor:
        w = tracked.weight
        self._pulls[tracked.name] += 1
        self.steps = max(self.steps, self._pulls[tracked.name])
        return grad.add(w - tracked.ready(w).part(w), alpha=self.settings.weight)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, whose weights have no hooks: it raises where they change without an optimizer."""
        return self.__dict__ | {"_pulling": {}, "is_watching": True}

    def facts(self, root: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        return {"anchored": self.steps}
