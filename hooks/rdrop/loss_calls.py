"""Calls of torch.nn.functional losses, bound to their signatures: those with a formula; add a new one here."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import _reduction
from torch.nn import functional as F  # noqa: N812

from surgery.errors import SettingError

from .divergence import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
    nll_loss,
)
from .objective import Objective, RDropLoss


def _log_softmax(input: torch.Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Stand in for torch.log_softmax and Tensor.log_softmax, which are builtins without a signature."""


_SIGNATURES: dict[Any, tuple[str, inspect.Signature]] = {
    function: (function.__name__, inspect.signature(function))
    for function in (
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.cross_entropy,
        F.log_softmax,
        F.mse_loss,
        F.nll_loss,
    )
} | {
    function: ("log_softmax", inspect.signature(_log_softmax))
    for function in (torch.log_softmax, torch.Tensor.log_softmax, torch.special.log_softmax)
}

SUPPORTED = frozenset(_SIGNATURES)
"""Loss functions that R-Drop computes from the outputs of both passes."""

UNSUPPORTED = frozenset(
    function
    for home in (F, torch)
    for name in dir(home)
    if (name.endswith("_loss") or name in ("kl_div", "linear_cross_entropy"))
    and (function := getattr(home, name)) not in SUPPORTED
)
"""Loss functions that R-Drop has no formula for."""

PAIRWISE: dict[Any, str] = {F.logsigmoid: "logsigmoid", F.softplus: "softplus"}
"""Functions that losses of pairs of outputs are made by, and seldom others, with their names."""

LEAVE_OUT = (
    "R-Drop has no formula for it, as for all losses of pairs or groups (DPO, GRPO, reward). Leave rdrop out; noise, "
    "Mixout and the anchor work there."
)

_TwoPassLoss = Callable[["LossCall", "LossCall", Objective], RDropLoss]


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function.

    Args:
        name: of the function in torch.nn.functional.
        arguments: all of them by name, with defaults; size_average and reduce are turned into `reduction`.
    """

    name: str
    arguments: Mapping[str, Any]

    @property
    def input(self) -> torch.Tensor:
        """The logits, log-probabilities, probabilities or predictions."""
        logits: torch.Tensor = self.arguments["input"]
        return logits

    @property
    def prediction(self) -> torch.Tensor:
        """What requires grad: the input, unless mse_loss was given its arguments the other way round."""
        target = self.arguments.get("target")
        return target if target is not None and target.requires_grad and not self.input.requires_grad else self.input

    @property
    def dim(self) -> int:
        """The dimension of the classes, of log_softmax."""
        dim: int | None = self.arguments["dim"]
        chosen: int = F._get_softmax_dim("log_softmax", self.input.dim(), 5) if dim is None else dim  # type: ignore[attr-defined]
        return chosen

    def torch_loss(self, *, is_doubled: bool) -> torch.Tensor:
        """Return what torch's own function makes of the call; of a doubled batch, on the scale of one pass."""
        arguments = {**self.arguments, **({"dim": self.dim} if self.name == "log_softmax" else {})}
        loss: torch.Tensor = getattr(F, self.name)(**arguments)
        return loss / 2 if is_doubled and arguments["reduction"] == "sum" else loss


def read_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LossCall:
    """Bind the arguments of a call of one of SUPPORTED to their names."""
    name, signature = _SIGNATURES[function]
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    size_average, reduce = arguments.pop("size_average", None), arguments.pop("reduce", None)
    if size_average is not None or reduce is not None:
        arguments["reduction"] = _reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    return LossCall(name, arguments)


def any_requires_grad(args: Any) -> bool:
    """Tell whether a loss of these arguments can be minimized: grad mode is on, and one of them requires grad."""
    return torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def two_pass_loss(first: LossCall, second: LossCall, objective: Objective) -> RDropLoss:
    """Return R-Drop's loss for one call in each pass, of the same function.

    Raises:
        SettingError: the labels do not fit the logits, or the two passes do not fit each other.
    """
    if first.input.shape != second.input.shape:
        raise SettingError(
            f"rdrop: expected logits of one shape in both passes, got {tuple(first.input.shape)} and "
            f"{tuple(second.input.shape)} in {second.name}. The model must take the same way twice."
        )
    check_target_shape(second)
    return _TWO_PASS_LOSSES[second.name](first, second, objective)


def doubled_batch_loss(call: LossCall, objective: Objective) -> RDropLoss:
    """Return R-Drop's loss for one call on a doubled batch: both passes one after the other, in dimension 0."""
    if call.name == "cross_entropy":
        return cross_entropy(call.input, None, call.arguments["target"], objective, **_loss_options(call))
    first, second = _chunk_batched(call.arguments, call.input)
    return two_pass_loss(
        LossCall(call.name, {**call.arguments, **first}), LossCall(call.name, {**call.arguments, **second}), objective
    )


USE_TWO_PASSES = 'Use RDrop(alpha, passes="two").'


def check_is_doubled(call: LossCall, *, compares_labels: bool) -> None:
    """Raise unless a loss was called on one batch twice over.

    Args:
        compares_labels: look at the labels of both halves too, which synchronizes with the device.
    Raises:
        SettingError: the batch is not in the first dimension of what the loss function was given.
    """
    logits, target = call.input, call.arguments["target"]
    if logits.dim() == 0 or logits.shape[0] % 2 or target.shape[:1] != logits.shape[:1]:
        raise SettingError(
            f"passes: expected the doubled batch in the first dimension of logits and labels, got shapes "
            f"{tuple(logits.shape)} and {tuple(target.shape)} in {call.name}. {USE_TWO_PASSES}"
        )
    if compares_labels and not target.is_floating_point() and not torch.equal(*target.chunk(2)):
        raise SettingError(
            f"passes: expected the labels of one batch twice over in {call.name}, got halves that differ: the batch "
            f"is not in the first dimension. {USE_TWO_PASSES}"
        )


def _chunk_batched(arguments: Mapping[str, Any], logits: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Halve the arguments whose first dimension is the doubled batch; class weights are not."""
    batched = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor)
        and value.shape[:1] == logits.shape[:1]
        and (name == "target" or value.dim() == logits.dim() > 1 or value is logits)
    }
    first, second = ({name: value.chunk(2)[half] for name, value in batched.items()} for half in (0, 1))
    return first, second


def _loss_options(call: LossCall) -> dict[str, Any]:
    return {name: value for name, value in call.arguments.items() if name not in ("input", "target")}


def check_target_shape(call: LossCall) -> None:
    """Raise unless class indices have the shape of the logits without the class dimension.

    Raises:
        SettingError: they do not.
    """
    target = call.arguments.get("target")
    if call.name not in ("cross_entropy", "nll_loss") or target is None or target.is_floating_point():
        return
    shape = call.input.shape
    expected = shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]
    if target.shape != expected:
        raise SettingError(
            f"labels: expected shape {tuple(expected)} for logits of shape {tuple(shape)}, got {tuple(target.shape)}. "
            "Give one label for each row."
        )


def _with_one_target(function: Callable[..., RDropLoss]) -> _TwoPassLoss:
    def apply(first: LossCall, second: LossCall, objective: Objective) -> RDropLoss:
        return function(first.input, second.input, second.arguments["target"], objective, **_loss_options(second))

    return apply


def _mse_loss(first: LossCall, second: LossCall, objective: Objective) -> RDropLoss:
    return mse_loss(
        first.input,
        second.input,
        first.arguments["target"],
        second.arguments["target"],
        objective,
        **_loss_options(second),
    )


_TWO_PASS_LOSSES: dict[str, _TwoPassLoss] = {
    "binary_cross_entropy": _with_one_target(binary_cross_entropy),
    "binary_cross_entropy_with_logits": _with_one_target(binary_cross_entropy_with_logits),
    "cross_entropy": _with_one_target(cross_entropy),
    "mse_loss": _mse_loss,
    "nll_loss": _with_one_target(nll_loss),
}
