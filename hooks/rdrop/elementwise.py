"""R-Drop's loss where each element is a prediction of its own: probabilities of labels, and regression."""

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from .objective import Blend, Joined, join, loss_dtype, mean_of_both, widen


def binary_cross_entropy_with_logits(
    a: torch.Tensor,
    b: torch.Tensor,
    target: torch.Tensor,
    blend: Blend,
    *,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> Joined:
    """Join two F.binary_cross_entropy_with_logits: each element is a distribution, with 1/2 (p - q) (a - b).

    Args:
        a, b: logits of target's shape.
        target: probabilities.
        blend: how the parts are put together.
        weight: scales the loss and the divergence of each element; broadcasts.
        reduction: none, mean or sum.
        pos_weight: scales the loss only.
    """
    dtype = loss_dtype(a, target)
    a, b, target, weight, pos_weight = (widen(x) for x in (a, b, target, weight, pos_weight))
    how: dict[str, Any] = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
    ce = mean_of_both(lambda x: F.binary_cross_entropy_with_logits(x, target, **how), a, b)
    s = 0.5 * (a.sigmoid() - b.sigmoid()) * torch.where(a == b, 0, a - b)
    return _join_elements(ce, s, blend, dtype, weight=weight, reduction=reduction)


def binary_cross_entropy(
    p: torch.Tensor,
    q: torch.Tensor,
    target: torch.Tensor,
    blend: Blend,
    *,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> Joined:
    """Join two F.binary_cross_entropy, of probabilities; logarithms are clamped at -100 as torch's are."""
    dtype = loss_dtype(p, target)
    p, q, target, weight = (widen(x) for x in (p, q, target, weight))
    ce = mean_of_both(lambda x: F.binary_cross_entropy(x, target, weight=weight, reduction=reduction), p, q)
    s = 0.5 * (p - q) * (_Logit.apply(p) - _Logit.apply(q))  # type: ignore[no-untyped-call]
    return _join_elements(ce, s, blend, dtype, weight=weight, reduction=reduction)


def mse_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    target_a: torch.Tensor,
    target_b: torch.Tensor,
    blend: Blend,
    *,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> Joined:
    """Join two F.mse_loss; kl is the same loss between the residuals (the paper, A.4).

    Args:
        a, b: outputs.
        target_a, target_b: what each pass was compared with. For one target, the residuals differ as a and b do.
        blend: how the parts are put together.
        weight, reduction: as F.mse_loss's.
    """
    dtype = loss_dtype(a, target_a)
    a, b, target_a, target_b, weight = (widen(x) for x in (a, b, target_a, target_b, weight))
    how: dict[str, Any] = {"reduction": reduction, "weight": weight}
    ce = 0.5 * (F.mse_loss(a, target_a, **how) + F.mse_loss(b, target_b, **how))
    if blend.sums:
        how = {"reduction": "none" if reduction == "none" else "sum"}
    kl = F.mse_loss(a - target_a, b - target_b, **how)
    count = a.numel() if weight is None else weight.expand_as(a).sum()
    return join(ce, kl, blend, dtype, reduction=reduction, count=count, rows=a.numel())


def _join_elements(
    ce: torch.Tensor,
    s: torch.Tensor,
    blend: Blend,
    dtype: torch.dtype,
    *,
    weight: torch.Tensor | None,
    reduction: str,
) -> Joined:
    """Reduce the divergence of each element as torch reduces losses of elements, and join both."""
    kl = s * weight if weight is not None and not blend.sums else s
    if reduction != "none":
        kl = kl.sum() if reduction == "sum" or blend.sums else kl.mean()
    return join(ce, kl, blend, dtype, reduction=reduction, count=s.numel(), rows=s.numel())


class _Logit(torch.autograd.Function):
    """log p - log(1 - p) with both logarithms at least -100, and the derivative as torch's loss caps it."""

    @staticmethod
    def forward(ctx: Any, p: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(p)
        return p.log().clamp_(min=-100) - p.neg().log1p_().clamp_(min=-100)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (p,) = ctx.saved_tensors
        return grad / (p * (1 - p)).clamp(min=1e-12)
