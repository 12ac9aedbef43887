"""Hears the loss functions that a model calls in its forward, and answers in their place."""

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from surgery.errors import SettingError, SourceError

from ..compiling import eagerly
from .logprobs import JoinedRows, LogProbs, as_log_probs
from .loss_calls import (
    SUPPORTED,
    UNSUPPORTED,
    USE_TWO_PASSES,
    LossCall,
    any_requires_grad,
    check_target_shape,
    read_call,
)
from .paired import Ticket

_HEARD = SUPPORTED | UNSUPPORTED
_HEARD_ONE_BY_ONE = tuple(_HEARD)


class Hearing:
    """The loss calls of one forward of `root`: of its two passes, matched in their order, or of one doubled batch.

    Args:
        ticket: makes one loss of two calls.
        rows: first dimensions of what one pass makes, if the batch is doubled.
    """

    def __init__(self, root: nn.Module, ticket: Ticket, rows: tuple[int, ...] | None) -> None:
        self.root = root
        self.ticket = ticket
        self.rows = rows
        self.first_output: Any = None
        self._is_second = False
        self._tape: list[LossCall] = []
        self._next = 0

    def hear(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Answer a call: as torch does in the first pass, with the loss of both in the second.

        Raises:
            SourceError: the first pass has called another loss here.
            SettingError: the loss of a doubled batch cannot be told from that of one pass.
        """
        values = [*args, *kwargs.values()]
        is_joined = any(isinstance(value, LogProbs | JoinedRows) for value in values)
        if is_joined or not any_requires_grad(values) or calls_of(self.root) == 0:
            return func(*args, **kwargs)
        if func in UNSUPPORTED:
            if self.rows is not None:
                raise SettingError(f"passes: expected losses that can be halved, got {func.__name__}. {USE_TWO_PASSES}")
            self.ticket.pass_by(func.__name__)
            return func(*args, **kwargs)
        call = read_call(func, args, kwargs)
        check_target_shape(call)
        if self.rows is not None:
            if call.name == "log_softmax" or call.arguments["reduction"] == "none":
                raise SettingError(
                    f"passes: expected a loss that is reduced on a doubled batch, got {call.name} without. "
                    f"{USE_TWO_PASSES}"
                )
            return self.ticket.meet(None, call)
        if not self._is_second:
            self._tape.append(call)
            if call.name == "log_softmax":
                return _as_first(func(*args, **kwargs))
            with torch.no_grad():  # a loss is made once, with the second pass
                return func(*args, **kwargs)
        first = self._tape[self._next] if self._next < len(self._tape) else None
        self._next += 1
        if first is None or first.name != call.name:
            raise SourceError(f"rdrop: expected the same losses in both passes, got {call.name} in the second only.")
        return self.ticket.meet(first, call)

    def turn(self, output: Any) -> None:
        """End the first pass, whose output this is."""
        self.first_output = output
        self._is_second = True

    def refuse_missing(self) -> None:
        """Raise if the second pass has left out a loss that the first one has called."""
        if self._next < len(self._tape):
            name = self._tape[self._next].name
            raise SourceError(f"rdrop: expected the same losses in both passes, got {name} in the first only.")


def _as_first(log_p: torch.Tensor) -> torch.Tensor:
    """Mark log-probabilities as in the second pass, for the same calls to be heard in both."""
    return as_log_probs(log_p, partial(F.nll_loss, log_p.detach()), lambda: log_p)


class LossMode(TorchFunctionMode):
    """Passes loss functions to a Hearing. One object for all forwards: torch.compile guards on it."""

    def __init__(self) -> None:
        self.hearing: Hearing | None = None

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # torch.compile has no hash of some functions
        is_compiling = torch.compiler.is_compiling()
        if any(func is heard for heard in _HEARD_ONE_BY_ONE) if is_compiling else func in _HEARD:
            return _hear(self, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def open(self, hearing: Hearing) -> None:
        """Hear what is called from now on."""
        self.hearing = hearing
        _push_mode(self)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Hear nothing more, whatever modes have been entered since."""
        self.hearing = None
        above = []
        while self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            if (mode := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
                above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> Any:
        return LossMode, ()


@eagerly
def _hear(mode: LossMode, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs) if mode.hearing is None else mode.hearing.hear(func, args, kwargs)


def calls_of(root: nn.Module) -> int:
    """Count the calls of a module that are under way. A KeyboardInterrupt ends them without running any hook."""
    count = 0
    frame = sys._getframe(1)
    while frame is not None:
        count += frame.f_code is _CALL and frame.f_locals.get("self") is root
        frame = frame.f_back  # type: ignore[assignment]
    return count


_CALL = unwrap(nn.Module._call_impl).__code__  # `surgery run` may be listening to calls
