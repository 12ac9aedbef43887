"""F.binary_cross_entropy, with and without logits, and F.mse_loss of two passes: each element is its own prediction."""

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from .objective import Objective, RDropLoss, combine_terms, loss_dtype, mean_over_passes, upcast_half


def binary_cross_entropy_with_logits(
    a: torch.Tensor,
    b: torch.Tensor,
    target: torch.Tensor,
    objective: Objective,
    *,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> RDropLoss:
    """Return R-Drop's loss of two F.binary_cross_entropy_with_logits.

    Each element is a distribution, whose symmetric KL is 1/2 (p - q) (a - b).

    Args:
        a, b: logits of target's shape.
        target: probabilities.
        objective: weights of the two terms.
        weight: scales the loss and the divergence of each element; broadcasts.
        reduction: none, mean or sum.
        pos_weight: scales the loss only.
    """
    dtype = loss_dtype(a, target)
    a, b, target, weight, pos_weight = (upcast_half(x) for x in (a, b, target, weight, pos_weight))
    options: dict[str, Any] = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
    ce = mean_over_passes(lambda x: F.binary_cross_entropy_with_logits(x, target, **options), a, b)
    s = 0.5 * (a.sigmoid() - b.sigmoid()) * torch.where(a == b, 0, a - b)
    return _reduce_elements(ce, s, objective, dtype, weight=weight, reduction=reduction)


def binary_cross_entropy(
    p: torch.Tensor,
    q: torch.Tensor,
    target: torch.Tensor,
    objective: Objective,
    *,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> RDropLoss:
    """Return R-Drop's loss of two F.binary_cross_entropy, whose logarithms are clamped at -100 as torch's are."""
    dtype = loss_dtype(p, target)
    p, q, target, weight = (upcast_half(x) for x in (p, q, target, weight))
    ce = mean_over_passes(lambda x: F.binary_cross_entropy(x, target, weight=weight, reduction=reduction), p, q)
    s = 0.5 * (p - q) * (_ClampedLogit.apply(p) - _ClampedLogit.apply(q))  # type: ignore[no-untyped-call]
    return _reduce_elements(ce, s, objective, dtype, weight=weight, reduction=reduction)


def mse_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    target_a: torch.Tensor,
    target_b: torch.Tensor,
    objective: Objective,
    *,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> RDropLoss:
    """Return R-Drop's loss of two F.mse_loss; kl is the same loss between the residuals (the paper, A.4).

    Args:
        a, b: outputs.
        target_a, target_b: what each pass was compared with. For one target, the residuals differ as a and b do.
        objective: weights of the two terms.
        weight, reduction: as F.mse_loss's.
    """
    dtype = loss_dtype(a, target_a)
    a, b, target_a, target_b, weight = (upcast_half(x) for x in (a, b, target_a, target_b, weight))
    options: dict[str, Any] = {"reduction": reduction, "weight": weight}
    ce = 0.5 * (F.mse_loss(a, target_a, **options) + F.mse_loss(b, target_b, **options))
    if objective.sums_kl:
        options = {"reduction": "none" if reduction == "none" else "sum"}
    kl = F.mse_loss(a - target_a, b - target_b, **options)
    count = a.numel() if weight is None else weight.expand_as(a).sum()
    return combine_terms(ce, kl, objective, dtype, reduction=reduction, count=count, rows=a.numel())


def _reduce_elements(
    ce: torch.Tensor,
    s: torch.Tensor,
    objective: Objective,
    dtype: torch.dtype,
    *,
    weight: torch.Tensor | None,
    reduction: str,
) -> RDropLoss:
    """Reduce the divergence of each element as torch reduces elementwise losses, and combine the terms."""
    kl = s * weight if weight is not None and not objective.sums_kl else s
    if reduction != "none":
        kl = kl.sum() if reduction == "sum" or objective.sums_kl else kl.mean()
    return combine_terms(ce, kl, objective, dtype, reduction=reduction, count=s.numel(), rows=s.numel())


class _ClampedLogit(torch.autograd.Function):
    """log p - log(1 - p) with both logarithms at least -100, and the derivative as torch's loss caps it."""

    @staticmethod
    def forward(ctx: Any, p: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(p)
        return p.log().clamp_(min=-100) - p.neg().log1p_().clamp_(min=-100)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (p,) = ctx.saved_tensors
        return grad / (p * (1 - p)).clamp(min=1e-12)
