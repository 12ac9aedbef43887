"""Tell patches of the steps of any torch optimizer, whoever built it, before or after them."""

import weakref
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Listener(Protocol):
    """Is called at every step of every optimizer of the process.

    Args:
        is_closure: the step is handed a closure, which computes the gradients only then.
    """

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None: ...

    def after_step(self, optimizer: Optimizer) -> None: ...


_listeners: "weakref.WeakSet[Listener]" = weakref.WeakSet()
_handles: list[Any] = []


def watch(listener: Listener) -> None:
    """Call it from now on, as long as somebody else holds it."""
    _listeners.add(listener)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def forget(listener: Listener) -> None:
    """Call it no longer; with the last one, the optimizers' hooks go."""
    _listeners.discard(listener)
    if not _listeners:
        while _handles:
            _handles.pop().remove()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    is_closure = any(map(callable, [*args[1:], *kwargs.values()]))  # the first is the optimizer
    for listener in list(_listeners):
        listener.before_step(optimizer, is_closure=is_closure)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    for listener in list(_listeners):
        listener.after_step(optimizer)
