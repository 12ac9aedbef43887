"""Calls of the fused heads of TRL, Liger and cut-cross-entropy, read from their arguments; add a new one here."""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from .fused import Pass, Scaling
from .loss_calls import LEAVE_OUT

Reduction = Literal["mean", "sum", "none", "log_probs"]


@dataclass(frozen=True)
class HeadCall:
    """One call of a fused head.

    Args:
        name: of the head.
        scored: what it is given, of the tokens that have a label.
        target: their labels, int64, (N).
        scaling: of its logits.
        reduction: of its loss; "log_probs" where it returns those of the labels instead.
        count: what "mean" divides by.
        call_own: makes the call itself, as it would be without R-Drop; with `detached`, of tensors without a gradient.
        stand_in: what it returns in the first pass, whose loss is made in the second.
        wrap: puts R-Drop's loss, (N) or 0-dim, in the place of its own; not for "log_probs".
    """

    name: str
    scored: Pass
    target: torch.Tensor
    scaling: Scaling
    reduction: Reduction
    count: Any
    call_own: Callable[..., Any]
    stand_in: Callable[[], Any]
    wrap: Callable[[torch.Tensor], Any] = lambda loss: loss

    @property
    def prediction(self) -> torch.Tensor:
        """What differs between two passes."""
        return self.scored.hidden

    def torch_loss(self, *, is_doubled: bool) -> Any:  # noqa: ARG002
        """Return what the head itself returns."""
        return self.call_own()


@dataclass(frozen=True)
class FusedHead:
    """An autograd.Function that makes a loss of hidden states.

    Args:
        name: for messages.
        module: where the class is, if it has been imported.
        class_name: of the autograd.Function.
        known: the arguments that R-Drop knows, but for ctx. Others may have their defaults.
        find_fault: what R-Drop has no formula for in its arguments by name, and what to do; or None.
        read: returns the call.
    """

    name: str
    module: str
    class_name: str
    known: tuple[str, ...]
    find_fault: Callable[[Mapping[str, Any]], str | None]
    read: Callable[["FusedHead", Mapping[str, Any], Callable[..., Any]], HeadCall]

    def loaded(self) -> Any:
        """Return the class, None if nobody has imported it."""
        return getattr(sys.modules.get(self.module), self.class_name, None)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by their names.

        Raises:
            TypeError: there are some that R-Drop does not know, as of another version.
        """
        signature = _signature(self.loaded())
        bound = signature.bind(None, *args, **kwargs)
        for name, value in list(bound.arguments.items())[1:]:  # but for ctx
            if name not in self.known and value is not signature.parameters[name].default:
                raise TypeError(f"{name!r} is not known")
        bound.apply_defaults()
        return dict(bound.arguments)


@cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function.forward)


# -- TRL: add_fused_lm_head, of SFTTrainer -------------------------------------------------------------------------


def _read_trl(head: FusedHead, named: Mapping[str, Any], call_own: Callable[..., Any]) -> HeadCall:
    target, scored = named["targets"], Pass(named["hidden"], named["weight"], named["bias"])
    scaling = Scaling(float(named["logit_scale"]), named["final_logit_softcapping"], float(named["temperature"]))

    def stand_in() -> Any:
        zeros = torch.zeros(len(target), dtype=torch.float32, device=scored.hidden.device)
        outputs = {"entropy": zeros, "log_sum_sq_probs": zeros, "mean_logits": zeros, "is_top1": zeros > 0}
        return zeros, *(value if name in named["outputs"] else None for name, value in outputs.items())

    return HeadCall(head.name, scored, target, scaling, "log_probs", None, call_own, stand_in)


def _find_fault_of_trl(named: Mapping[str, Any]) -> str | None:  # noqa: ARG001
    trainer = _calling_trainer()
    if trainer is None or trainer == "sft":
        return None
    return f"rdrop: expected a loss with a formula, got that of TRL's {trainer.upper()} trainer: {LEAVE_OUT}"


def _calling_trainer() -> str | None:
    """Return which of TRL's trainers is calling the model: "sft" of trl.trainer.sft_trainer."""
    frame = sys._getframe(1)
    while frame is not None:
        package, _, name = str(frame.f_globals.get("__name__")).rpartition(".")
        if package.startswith("trl.") and name.endswith("_trainer") and name != "base_trainer":
            return name.removesuffix("_trainer")
        frame = frame.f_back  # type: ignore[assignment]
    return None


# -- Liger: fused_linear_cross_entropy -----------------------------------------------------------------------------

_LIGER_DEFAULTS = {"ce_weight": None, "lse_square_scale": 0.0, "label_smoothing": 0.0, "use_token_scaling": False}
_LIGER_METRICS = ("return_z_loss", "return_token_accuracy", "return_predicted_tokens")


def _find_fault_of_liger(named: Mapping[str, Any]) -> str | None:
    for name, default in _LIGER_DEFAULTS.items():
        if (got := named.get(name, default)) is not default and (default is None or got != default):
            return (
                f"rdrop: expected {name}={default} in Liger's fused_linear_cross_entropy, which R-Drop joins without, "
                f"got {'a tensor' if default is None else got}. Leave it out, or turn fused_linear_cross_entropy off."
            )
    return None


def _read_liger(head: FusedHead, named: Mapping[str, Any], call_own: Callable[..., Any]) -> HeadCall:
    hidden, target = named["_input"], named["target"]
    valid = target != named["ignore_index"]
    scored, labels = Pass(hidden[valid], named["weight"], named["bias"]), target[valid].long()
    reduction: Reduction = named["reduction"]
    has_metrics = any(named.get(name) for name in _LIGER_METRICS)

    def stand_in() -> Any:
        zeros = torch.zeros(len(target), dtype=torch.float32, device=hidden.device)
        loss = zeros if reduction == "none" else zeros.sum()
        metrics = zip(_LIGER_METRICS, (loss, loss, zeros.long()), strict=True)
        return loss, *(value if named.get(name) else None for name, value in metrics)

    def wrap(loss: torch.Tensor) -> Any:
        if reduction == "none":
            loss = loss.new_zeros(len(target)).masked_scatter(valid, loss)
        if not has_metrics:
            return loss, None, None, None
        return loss, *call_own(detached=True)[1:]  # of which Liger forms no gradients

    count = valid.sum().clamp(min=1)  # without a label Liger's loss is 0
    return HeadCall(
        head.name, scored, labels, Scaling(softcap=named["softcap"]), reduction, count, call_own, stand_in, wrap
    )


# -- Apple: cut_cross_entropy.linear_cross_entropy -----------------------------------------------------------------


def _read_cce(head: FusedHead, named: Mapping[str, Any], call_own: Callable[..., Any]) -> HeadCall:
    hidden, params = named["e"], named["params"]
    kept = torch.arange(len(hidden), device=hidden.device) if params.valids is None else params.valids.long()
    place = kept + int(params.shift)
    scored, labels = Pass(hidden[kept], named["c"]), params.targets[place].long()

    def wrap(loss: torch.Tensor) -> torch.Tensor:
        if params.reduction != "none":
            return loss
        return loss.new_zeros(len(hidden)).index_copy(0, place, loss).view(*params.batch_shape)

    def stand_in() -> torch.Tensor:
        shape = params.batch_shape if params.reduction == "none" else ()
        return torch.zeros(shape, dtype=torch.float32, device=hidden.device)

    return HeadCall(
        head.name, scored, labels, Scaling(softcap=params.softcap), params.reduction, len(labels), call_own, stand_in,
        wrap,
    )  # fmt: skip


FUSED_HEADS = (
    FusedHead(
        "TRL's fused_lm_head",
        "trl.kernels.chunked_logprob",
        "ChunkedLogProbFunction",
        # a chunk of words has no part in what comes out
        tuple("hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs".split()),
        _find_fault_of_trl,
        _read_trl,
    ),
    FusedHead(
        "Liger's fused_linear_cross_entropy",
        "liger_kernel.ops.fused_linear_cross_entropy",
        "LigerFusedLinearCrossEntropyFunction",
        (
            *("_input", "weight", "target", "bias", "ignore_index", "reduction", "softcap", *_LIGER_DEFAULTS),
            *(*_LIGER_METRICS, "accum_dtype", "ce_impl", "ce_mode", "chunk_mem_const"),  # the last: how it computes
        ),
        _find_fault_of_liger,
        _read_liger,
    ),
    FusedHead(
        "cut_cross_entropy.linear_cross_entropy",
        "cut_cross_entropy.cce",
        "LinearCrossEntropyFunction",
        ("e", "c", "params"),
        lambda _: None,
        _read_cce,
    ),
)
