"""Stand-ins for the autograd.Functions of fused heads, which tests do not install: their arguments, by whole logits."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812


class ByAutograd(torch.autograd.Function):
    """Differentiates `compute`, of a subclass, by autograd; `calls` counts its forwards."""

    calls = 0

    @classmethod
    def run(cls, ctx: Any, *args: Any) -> Any:
        ByAutograd.calls += 1
        inner = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in args]
        with torch.enable_grad():
            results = cls.compute(*inner)  # type: ignore[attr-defined]
        ctx.inner, ctx.results = inner, results
        ctx.set_materialize_grads(False)
        is_alone = isinstance(results, torch.Tensor)
        outputs = [None if x is None else x.detach() for x in ([results] if is_alone else results)]
        ctx.mark_non_differentiable(*(x for x in outputs if x is not None and not x.is_floating_point()))
        return outputs[0] if is_alone else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        results = [ctx.results] if isinstance(ctx.results, torch.Tensor) else ctx.results
        pairs = [(x, g) for x, g in zip(results, grads, strict=True) if g is not None]
        wanted = [x for x in ctx.inner if isinstance(x, torch.Tensor) and x.requires_grad]
        found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs]))
        return tuple(next(found) if isinstance(x, torch.Tensor) and x.requires_grad else None for x in ctx.inner)


def logits_of(hidden: Any, weight: Any, bias: Any, scale: float, softcap: float | None, temperature: float) -> Any:
    z = F.linear(hidden, weight, bias) * scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


class ChunkedLogProbFunction(ByAutograd):
    """TRL's, of 1.16."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> Any:  # fmt: skip
        args = hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        return ChunkedLogProbFunction.run(ctx, *args)

    @staticmethod
    def compute(
        hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, _: int, softcap: Any, scale: float,
        outputs: Any,
    ) -> Any:  # fmt: skip
        z = logits_of(hidden, weight, bias, scale, softcap, temperature)
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) if "entropy" in outputs else None
        is_top1 = z.argmax(-1) == targets if "is_top1" in outputs else None
        return log_p.gather(1, targets[:, None])[:, 0], entropy, None, None, is_top1


class LigerFusedLinearCrossEntropyFunction(ByAutograd):
    """Liger's, of 0.8.5."""

    @staticmethod
    def forward(
        ctx: Any, _input: Any, weight: Any, target: Any, bias: Any = None, ce_weight: Any = None,
        ignore_index: int = -100, lse_square_scale: float = 0.0, label_smoothing: float = 0.0,
        reduction: str = "mean", softcap: Any = None, return_z_loss: bool = False, accum_dtype: Any = None,
        use_token_scaling: bool = False, return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
        ce_impl: Any = None, ce_mode: Any = None, chunk_mem_const: int = 1,
    ) -> Any:  # fmt: skip
        args = (
            _input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction,
            softcap, return_z_loss, accum_dtype, use_token_scaling, return_token_accuracy, return_predicted_tokens,
            ce_impl, ce_mode, chunk_mem_const,
        )  # fmt: skip
        return LigerFusedLinearCrossEntropyFunction.run(ctx, *args)

    @staticmethod
    def compute(hidden: Any, weight: Any, target: Any, bias: Any, *options: Any) -> Any:
        ignore_index, reduction, softcap, has_accuracy = options[1], options[4], options[5], options[9]
        z = logits_of(hidden, weight, bias, 1.0, softcap, 1.0)
        valid = target != ignore_index
        accuracy = (z.argmax(-1) == target)[valid].double().mean() if has_accuracy else None
        return F.cross_entropy(z, target, reduction=reduction, ignore_index=ignore_index), None, accuracy, None


@dataclass
class CCEParams:
    """cut-cross-entropy's, of 25.1."""

    targets: torch.Tensor
    valids: torch.Tensor | None
    softcap: float | None
    reduction: str
    filter_eps: float | None
    shift: bool
    batch_shape: torch.Size


class LinearCrossEntropyFunction(ByAutograd):
    """cut-cross-entropy's, of 25.1."""

    @staticmethod
    def forward(ctx: Any, e: Any, c: Any, params: CCEParams) -> Any:
        return LinearCrossEntropyFunction.run(ctx, e, c, params)

    @staticmethod
    def compute(e: Any, c: Any, params: CCEParams) -> Any:
        assert params.valids is not None
        place = params.valids.long()
        z = logits_of(e[place], c, None, 1.0, params.softcap, 1.0)
        return F.cross_entropy(z, params.targets[place + params.shift], reduction=params.reduction)


STAND_INS = {
    "trl": ("trl.kernels.chunked_logprob", ChunkedLogProbFunction),
    "liger": ("liger_kernel.ops.fused_linear_cross_entropy", LigerFusedLinearCrossEntropyFunction),
    "cce": ("cut_cross_entropy.cce", LinearCrossEntropyFunction),
}


@contextmanager
def stand_in(name: str) -> Iterator[Any]:
    """Have a library's module hold its stand-in, as if the script had imported it; yield the class."""
    module_name, cls = STAND_INS[name]
    before = sys.modules.get(module_name)
    module = sys.modules[module_name] = ModuleType(module_name)
    setattr(module, cls.__name__, cls)
    try:
        yield cls
    finally:
        if before is None:
            del sys.modules[module_name]
        else:
            sys.modules[module_name] = before


def real(name: str) -> Any:
    """Return the library's own class."""
    module_name, cls = STAND_INS[name]
    return getattr(importlib.import_module(module_name), cls.__name__)
