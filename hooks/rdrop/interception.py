"""TorchFunctionMode that intercepts loss functions called inside forward, so that both passes share one loss."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_map_only

from surgery.errors import SettingError

from ..active_calls import count_active_calls
from ..compiling import eagerly, is_called_compiled
from .fused_calls import FusedHead, HeadCall
from .fused_interception import start_listening, stop_listening
from .logprobs import PairedLogProbs, UnreducedLoss, as_log_probs
from .loss_calls import (
    SUPPORTED,
    UNSUPPORTED,
    USE_TWO_PASSES,
    LossCall,
    any_requires_grad,
    check_target_shape,
    read_call,
)
from .paired import PairedForward

_INTERCEPTED = SUPPORTED | UNSUPPORTED
_INTERCEPTED_ONE_BY_ONE = tuple(_INTERCEPTED)


class LossInterception:
    """The loss calls in one forward of `root`: those of its two passes, matched in order, or those on a doubled batch.

    Args:
        forward: makes one loss of two calls.
        batch_sizes: first dimensions of what one pass makes, if the batch is doubled.
    """

    def __init__(self, root: nn.Module, forward: PairedForward, batch_sizes: tuple[int, ...] | None) -> None:
        self.root = root
        self.forward = forward
        self.batch_sizes = batch_sizes
        self.first_output: Any = None
        self._is_second_pass = False
        self._first_calls: list[LossCall | HeadCall] = []
        self._position = 0

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of a loss function: torch's own in the first pass, the loss of both in the second.

        Raises:
            SourceError: the first pass has called another loss here, and R-Drop may not step aside.
            SettingError: the loss of a doubled batch cannot be told from that of one pass.
        """
        values = [*args, *kwargs.values()]
        has_kl = any(isinstance(value, PairedLogProbs | UnreducedLoss) for value in values)
        if has_kl or not any_requires_grad(values) or count_active_calls(self.root) == 0:
            return func(*args, **kwargs)
        if func in UNSUPPORTED:
            if self.batch_sizes is not None:
                raise SettingError(f"passes: expected losses that can be halved, got {func.__name__}. {USE_TWO_PASSES}")
            self.forward.note_unjoined(func.__name__)
            return func(*args, **kwargs)
        call = read_call(func, args, kwargs)
        check_target_shape(call)
        if self.batch_sizes is not None:
            return self._doubled_batch_loss(call)
        if not self._is_second_pass:
            self._first_calls.append(call)
            if call.name == "log_softmax":
                return _as_first_log_probs(func(*args, **kwargs))
            with torch.no_grad():  # the loss of both is made in the second pass
                return func(*args, **kwargs)
        first = self._next_first_call(call)
        return func(*args, **kwargs) if first is None else self.forward.loss(first, call)

    def on_head(
        self, head: FusedHead, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return the result of a fused head: a stand-in in the first pass, one with the loss of both in the second.

        Args:
            own: the head's function itself.
        Returns:
            NotImplemented if no loss of this model is made.
        Raises:
            SourceError: as on_call, or R-Drop has no formula for what the head is to do.
            SettingError: the batch is doubled.
        """
        if not any_requires_grad([*args, *kwargs.values()]) or count_active_calls(self.root) == 0:
            return NotImplemented
        if self.batch_sizes is not None:
            raise SettingError(f"passes: expected losses that can be halved, got {head.name}. {USE_TWO_PASSES}")
        if (call := self._read_head(head, own, args, kwargs)) is None:
            return NotImplemented
        if not self._is_second_pass:
            self._first_calls.append(call)
            return call.stand_in()
        first = self._next_first_call(call)
        return call.call_own() if first is None else self.forward.loss(first, call)

    def _read_head(
        self, head: FusedHead, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> HeadCall | None:
        def call_own(*, detached: bool = False) -> Any:
            given = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs)) if detached else (args, kwargs)
            return own(*given[0], **given[1])

        try:
            named = head.bind(args, kwargs)
            fault = _COMPILED_HEAD.format(head.name) if is_called_compiled() else head.find_fault(named)
            call = None if fault else head.read(head, named, call_own)
        except (AttributeError, KeyError, TypeError) as error:
            call, fault = None, (
                f"rdrop: expected {head.name} as R-Drop knows it, got a version with other arguments ({error}). Turn "
                "the fused head off, or train without rdrop."
            )  # fmt: skip
        if fault:
            self.forward.refuse(fault)
        return call

    def _doubled_batch_loss(self, call: LossCall) -> Any:
        if call.name == "log_softmax" or call.arguments["reduction"] == "none":
            raise SettingError(
                f"passes: expected a loss that is reduced on a doubled batch, got {call.name} without. {USE_TWO_PASSES}"
            )
        return self.forward.loss(None, call)

    def _next_first_call(self, call: LossCall | HeadCall) -> Any:
        first = self._first_calls[self._position] if self._position < len(self._first_calls) else None
        self._position += 1
        if first is not None and first.name == call.name:
            return first
        self._refuse_unequal(call.name, "second")
        return None

    def _refuse_unequal(self, name: str, where: str) -> None:
        self.forward.refuse(f"rdrop: expected the same losses in both passes, got {name} in the {where} only.")

    def begin_second_pass(self, first_output: Any) -> None:
        """End the first pass, whose output this is."""
        self.first_output = first_output
        self._is_second_pass = True

    def check_all_matched(self) -> None:
        """Refuse a second pass that has left out a loss which the first one has called."""
        if self._position < len(self._first_calls):
            self._refuse_unequal(self._first_calls[self._position].name, "first")


_COMPILED_HEAD = (
    "rdrop: expected {} to be called by Python, got a call that torch.compile has taken apart. Compile the model's "
    "layers instead of the model, turn the fused head off, or train without rdrop."
)


def _as_first_log_probs(log_p: torch.Tensor) -> torch.Tensor:
    """Wrap log-probabilities as in the second pass, so that the same functions of them are intercepted in both."""
    return as_log_probs(log_p, partial(F.nll_loss, log_p.detach()), lambda: log_p)


class LossFunctionMode(TorchFunctionMode):
    """Passes the calls of loss functions to a LossInterception.

    There is one mode for all forwards of a model, because torch.compile guards on the object.
    """

    def __init__(self) -> None:
        self.interception: LossInterception | None = None

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # torch.compile cannot hash some functions
        is_compiling = torch.compiler.is_compiling()
        if any(func is each for each in _INTERCEPTED_ONE_BY_ONE) if is_compiling else func in _INTERCEPTED:
            return _intercept(self, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def start(self, interception: LossInterception) -> None:
        """Intercept what is called from now on."""
        self.interception = interception
        start_listening(self._on_head)
        _push_mode(self)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Leave the stack of modes, whatever modes have been entered since and have not been left."""
        self.interception = None
        stop_listening(self._on_head)
        above = []
        while self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            if (mode := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
                above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]

    def _on_head(
        self, head: FusedHead, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return NotImplemented if self.interception is None else self.interception.on_head(head, own, args, kwargs)

    def __reduce__(self) -> Any:
        return LossFunctionMode, ()


@eagerly
def _intercept(mode: LossFunctionMode, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs) if mode.interception is None else mode.interception.on_call(func, args, kwargs)


def find_fault(output: Any, forward: PairedForward) -> str | None:
    """Return what is wrong where the model returns a loss that R-Drop is not in."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if forward.has_loss or not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return None
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is not None:
        return forward.unknown_loss_message()
    return (
        "rdrop: expected logits, or a fused head of TRL, Liger or cut-cross-entropy, got a model that makes its loss "
        "without them. If that is a fused loss, or a compiled one, turn it off: fused_linear_cross_entropy=False for "
        "Liger, or in Trainer's liger_kernel_config; label_smoothing_factor or a compute_loss_func of the logits for "
        "TRL's SFTTrainer. Else train without rdrop."
    )
