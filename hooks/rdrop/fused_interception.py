"""Replaces `apply` of the fused heads' autograd.Functions while a forward is intercepted, and puts it back.

No TorchFunctionMode sees an autograd.Function. Whoever has imported one, under whatever name, has the class itself, so
that its `apply` is the one place where all calls pass.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from ..compiling import eagerly
from .fused_calls import FUSED_HEADS, FusedHead

Listener = Callable[[FusedHead, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Takes a call of a head, whose own `apply` is the second argument; returns NotImplemented for one of no concern."""

_lock = threading.Lock()
_listeners: list[Listener] = []
_replaced: dict[type, Any] = {}
"""By class, what its own __dict__ had as `apply`; None for nothing, as it inherits it."""


def start_listening(listener: Listener) -> None:
    """Hand the calls of all heads that have been imported to `listener`, until stop_listening."""
    with _lock:
        _listeners.append(listener)
        for head in FUSED_HEADS:
            if (cls := head.loaded()) is not None and cls not in _replaced:
                _replaced[cls] = vars(cls).get("apply")
                cls.apply = staticmethod(partial(_apply, head, cls.apply))


def stop_listening(listener: Listener) -> None:
    """Put the heads back, once nobody listens to them."""
    with _lock:
        if listener in _listeners:
            _listeners.remove(listener)
        if _listeners:
            return
        for cls, own in _replaced.items():
            if own is None:
                del cls.apply  # type: ignore[attr-defined]
            else:
                cls.apply = own  # type: ignore[attr-defined]
        _replaced.clear()


@eagerly
def _apply(head: FusedHead, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for listener in reversed(_listeners.copy()):  # of models within models, the inner one
        if (result := listener(head, own, args, kwargs)) is not NotImplemented:
            return result
    return own(*args, **kwargs)
