"""Tell patches of the steps of any torch optimizer, whoever built it, before or after them."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .compiling import eagerly
from .weights.pretrained import local


class Listener(Protocol):
    """Is called at every step of every optimizer of the process.

    Args:
        is_closure: the step is handed a closure, which computes the gradients only then.
    """

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None: ...

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None: ...


_listeners: "weakref.WeakSet[Listener]" = weakref.WeakSet()
_handles: list[Any] = []


def watch(listener: Listener) -> None:
    """Call it from now on, as long as somebody else holds it."""
    _listeners.add(listener)
    if not _handles:
        # torch.compile would follow them into the set, which the garbage collector changes
        _handles.append(register_optimizer_step_pre_hook(eagerly(_before_step)))
        _handles.append(register_optimizer_step_post_hook(eagerly(_after_step)))


def forget(listener: Listener) -> None:
    """Call it no longer; with the last one, the optimizers' hooks go."""
    _listeners.discard(listener)
    if not _listeners:
        while _handles:
            _handles.pop().remove()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in list(_listeners):
        listener.before_step(optimizer, is_closure=_is_closure(args, kwargs))


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in list(_listeners):
        listener.after_step(optimizer, is_closure=_is_closure(args, kwargs))


def _is_closure(args: Any, kwargs: Any) -> bool:
    return any(map(callable, [*args[1:], *kwargs.values()]))  # the first is the optimizer


def about_to_change(optimizer: Optimizer, weights: Iterable[torch.Tensor | None]) -> Iterator[torch.Tensor]:
    """Yield those of the weights that an optimizer has a gradient for."""
    changed = {
        id(w) for group in optimizer.param_groups for w in group["params"] if w.requires_grad and w.grad is not None
    }
    return (w for w in weights if w is not None and id(w) in changed)


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
        values = "" if steps else str(float(local(w.detach()).sum()))
        seen = steps, (w._version, values)
        if self._seen is not None and seen[1] != self._seen[1]:
            self._missed = self._missed + 1 if seen[0] == self._seen[0] else 0
        self._seen = seen
        return self._missed > 1
