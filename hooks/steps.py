"""Hooks on the steps of every torch optimizer, and the refusal of steps that a method has no part in.

A model in eval mode, or weights that somebody updates by hand, would train without regularization, in silence.
"""

import sys
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from surgery.escapes import get_logger

from .compiling import eagerly
from .regularizer import Regularizer
from .stepped import StepCount, Stepped
from .weights.pretrained import local

_log = get_logger(__name__)


class Listener(Protocol):
    """Is called at every step of every optimizer of the process.

    Args:
        is_closure: the step is handed a closure, which computes the gradients only then.
    """

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None: ...

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None: ...


_listeners: "weakref.WeakKeyDictionary[Listener, None]" = weakref.WeakKeyDictionary()
"""In the order in which they came: a `surgery run` changes weights before methods note what they are."""
_handles: list[Any] = []


def watch(listener: Listener) -> None:
    """Call it from now on, as long as somebody else holds it."""
    _listeners[listener] = None
    if not _handles:
        # torch.compile would follow them into the set, which the garbage collector changes
        _handles.append(register_optimizer_step_pre_hook(eagerly(_before_step)))
        _handles.append(register_optimizer_step_post_hook(eagerly(_after_step)))


def forget(listener: Listener) -> None:
    """Call it no longer; with the last one, the optimizers' hooks go."""
    _listeners.pop(listener, None)
    if not _listeners:
        while _handles:
            _handles.pop().remove()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in list(_listeners) if count_open_steps(optimizer) <= 1 else ():
        listener.before_step(optimizer, is_closure=_is_closure(args, kwargs))


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in list(_listeners) if count_open_steps(optimizer) <= 1 else ():
        listener.after_step(optimizer, is_closure=_is_closure(args, kwargs))


def count_open_steps(optimizer: Optimizer) -> int:
    """Count the steps of an optimizer that are under way: one whose step calls super().step() has two.

    torch wraps the step of each class that an optimizer is made of, and calls the hooks in every wrapper.
    """
    depth = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        depth += frame.f_code is _WRAPPER and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return depth


_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__  # noqa: ARG005
"""Of the function that torch puts around a step."""


def _is_closure(args: Any, kwargs: Any) -> bool:
    return any(map(callable, [*args[1:], *kwargs.values()]))  # the first is the optimizer


@dataclass(frozen=True)
class Activity:
    """What a regularizer has done so far.

    Args:
        state: changes with each forward that it takes part in; empty as long as there was none.
        is_known: False: it may have, where nobody can tell.
        acted: how often it has acted, of a method that leaves forwards out as it was asked to.
    """

    state: tuple[int, ...] = ()
    is_known: bool = True
    acted: int = 0


class AuditedRegularizer(Regularizer):
    """Compares the steps of a model's optimizers with what the method does: each may step once for each forward."""

    idle: ClassVar[str]
    """What to say of a step without the method."""
    is_strict: ClassVar[bool]
    """A step before the method has done anything is refused; else it is warned of, as one after that is."""

    def __init__(self) -> None:
        self.missed = 0
        """Optimizer steps that the method had no part in."""
        self.acted_steps = 0
        """Those that it acted in."""
        self._seen = Activity()
        self._served: set[int] = set()
        self._count = StepCount()
        self._has_acted_since = False

    @abstractmethod
    def activity(self) -> Activity:
        """Return what the method has done."""

    @abstractmethod
    def held(self, optimizer: Optimizer) -> Iterator[Stepped]:
        """Yield the model's weights that an optimizer is about to change."""

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Audit a step; what a closure does is seen after it."""
        if not is_closure:
            self._audit(optimizer)

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Audit a step with a closure."""
        if is_closure:
            self._audit(optimizer)

    def _audit(self, optimizer: Optimizer) -> None:
        """Raise, or warn once and count, where the method did nothing since this optimizer's last step."""
        activity, held = self.activity(), list(self.held(optimizer))
        if not activity.is_known or not held or not self._count.is_another(held):
            return
        if activity != self._seen:
            self._has_acted_since = activity.acted > self._seen.acted
            self._seen = activity
            self._served.clear()
        if activity.state and id(optimizer) not in self._served:  # one that steps beside another
            self._served.add(id(optimizer))
            self.acted_steps += self._has_acted_since
            return
        if not _has_gradient(held):
            return
        if self.is_strict and not activity.state:
            self.refuse(self.idle)
        if not self.is_aside and not self.missed:
            _log.warning("%s", self.idle)
        self.missed += 1


def _has_gradient(held: Sequence[Stepped]) -> bool:
    """Tell whether a gradient is not 0, as all are where somebody only wants an optimizer's state made."""
    if is_captured(one.w for one in held):  # where nothing can be read
        return False
    return any(bool(one.grad.any()) for one in held if one.grad is not None)


def is_captured(weights: Iterable[torch.Tensor]) -> bool:
    """Tell whether what is done to these weights now goes into a CUDA graph, which will repeat it without Python."""
    return any(w.is_cuda for w in weights) and torch.cuda.is_current_stream_capturing()


class StepWatch:
    """Notices weights that change with no step of a torch optimizer."""

    def __init__(self) -> None:
        self._seen: tuple[int, tuple[int, str]] | None = None
        self._missed = 0

    @torch.no_grad()
    def is_missed(self, w: torch.Tensor, steps: int) -> bool:
        """Tell whether `w` has changed twice between calls without a step; once may be a load_state_dict.

        Args:
            w: a trainable weight.
            steps: those of optimizers that hold it, so far.
        """
        # w.data has a version of its own; a sum costs a synchronization, so no longer than until the first step
        values = "" if steps else str(float(local(w).detach().sum()))
        seen = steps, (w._version, values)
        if self._seen is not None and seen[1] != self._seen[1]:
            self._missed = self._missed + 1 if seen[0] == self._seen[0] else 0
        self._seen = seen
        return self._missed > 1
