"""What methods share that act in the steps of optimizers: which weights a step changes, its lr, steps within steps."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SettingError
from surgery.escapes import get_logger

from .regularizer import Regularizer
from .stepped import StepCount, Stepped, find_stepped
from .steps import StepWatch, count_open_steps
from .weights.tracked import Tracked

_log = get_logger(__name__)
_PATIENCE = 100
"""Forwards between two steps, more than gradients are accumulated over."""


class OpenStep:
    """The step that a method is amid. An optimizer that wraps another has both of them step: the outer one counts."""

    def __init__(self) -> None:
        self._optimizer: weakref.ref[Optimizer] | None = None

    @property
    def _outer(self) -> Optimizer | None:
        """The optimizer whose step is under way. One that has raised is over."""
        outer = self._optimizer() if self._optimizer is not None else None
        return outer if outer is not None and count_open_steps(outer) else None

    @property
    def is_open(self) -> bool:
        return self._outer is not None

    def enter(self, optimizer: Optimizer) -> bool:
        """Open a step; False within one of another optimizer."""
        if self._outer not in (None, optimizer):
            return False
        self._optimizer = weakref.ref(optimizer)
        return True

    def leave(self, optimizer: Optimizer) -> bool:
        """Close the step that this optimizer has opened; False if it has not."""
        if self._optimizer is None or self._optimizer() is not optimizer:
            return False
        self._optimizer = None
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"_optimizer": None}


class StepRegularizer(Regularizer):
    """A method that acts in the steps of optimizers: it raises where weights change without one.

    Args:
        name: of the method.
        tracked: the weights that it acts on, as long as they are trainable.
    """

    def __init__(self, name: str, tracked: Sequence[Tracked]) -> None:
        self.steps = 0
        """Optimizer steps that it acted in."""
        self.is_watching = True
        """Weights that change without an optimizer of torch are an error."""
        self._name = name
        self._tracked = tracked
        self._open_step = OpenStep()
        self._count = StepCount()
        self._watch = StepWatch()
        self._seen = self._idle = 0

    def begin_forward(self, root: nn.Module) -> None:
        """Raise where weights have changed with no optimizer step of torch that the method could have acted in."""
        if not self.is_watching or not root.training or torch.compiler.is_compiling():
            return
        name, w = next(self.trainable(), ("", None))
        if w is None or self._open_step.is_open:  # a closure, such as LBFGS's, amid the step
            return
        self._idle = self._idle + 1 if self.steps == self._seen else 0
        self._seen = self.steps
        if self._idle == _PATIENCE:
            _log.warning(
                "%s: expected an optimizer that holds %s, or another weight that it acts on, got no step of one in %d "
                "forwards in training mode.",
                self._name,
                name,
                _PATIENCE,
            )
        if self._watch.is_missed(w, self.steps):
            self.refuse(
                f"{self._name}: expected a step of a torch.optim.Optimizer that holds {name}, got weights that "
                "change without one. Use such an optimizer, built from the model's own parameters."
            )

    def trainable(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the trainable parameters that it acts on, each with its name."""
        return ((one.name, one.weight) for one in self._tracked if one.weight.requires_grad)

    @property
    def has_acted(self) -> bool:
        return self.steps > 0


def held_weights(
    optimizer: Optimizer, tracked: Iterable[Tracked], *, is_closure: bool
) -> Iterator[tuple[Tracked, Stepped]]:
    """Yield those of the weights that an optimizer has a gradient for.

    Args:
        is_closure: as `find_stepped` has it.
    """
    known = {id(one.weight): one for one in tracked}
    for stepped in find_stepped(optimizer, is_closure=is_closure):
        if (one := known.get(id(stepped.w))) is not None:
            yield one, stepped


def lr_of(method: str, optimizer: Optimizer, group: dict[str, Any], use: str) -> float:
    """Return the lr of a parameter group.

    Args:
        method, use: which method wants it, and what for.
    Raises:
        SettingError: it has none.
    """
    lr = group.get("lr")
    if lr is None:
        raise SettingError(
            f"{method}: expected an optimizer with an lr, got {type(optimizer).__name__} with lr=None. "
            f"Give it an lr: {use}."
        )
    return float(lr)
