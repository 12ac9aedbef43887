"""R-Drop's loss: 1/2 (CE(a) + CE(b)) + alpha/2 * 1/2 [KL(p||q) + KL(q||p)], for each loss function that it can join.

Liang et al., arXiv 2106.14448, eq. 4. a and b are the outputs of two forward passes of one batch. The divergence is
reduced as the loss that it joins: same rows, same row weights, same denominator. Computed in float32 at least; the loss
has the dtype that torch's own function gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from surgery.errors import SettingError

from .elementwise import binary_cross_entropy as binary_cross_entropy
from .elementwise import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from .elementwise import mse_loss as mse_loss
from .objective import Blend as Blend
from .objective import Joined as Joined
from .objective import join, loss_dtype, mean_of_both, widen
from .rowwise import compare_rows, wide


def cross_entropy(
    a: torch.Tensor,
    b: torch.Tensor | None,
    target: torch.Tensor,
    blend: Blend,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Joined:
    """Join two F.cross_entropy.

    With class indices and no smoothing nothing of the logits' size is made but the gradient.

    Args:
        a, b: logits, (N, C), (C) or (N, C, d1, ...). b None: a is (2N, ...) and target of 2N, the two passes one after
            the other with equal targets; the result is that of N rows.
        target: class indices, or probabilities of a's shape.
        blend: how the parts are put together.
        weight, ignore_index, reduction, label_smoothing: as F.cross_entropy's.
    Raises:
        SettingError: target has another shape than the logits, or reduction is unknown.
    """
    if target.shape != a.shape and label_smoothing == 0:
        return _join_classes(a, b, target, blend, weight, ignore_index, reduction, is_log=False)
    dtype = loss_dtype(a)
    if b is None:
        (a, b), target = a.chunk(2), target.chunk(2)[0]
    how: dict[str, Any] = {"weight": widen(weight), "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    is_index = target.shape != a.shape
    wide_target = target if is_index else target.to(wide(target.dtype))
    ce = mean_of_both(
        lambda x: F.cross_entropy(x, wide_target, reduction=reduction, **how),
        widen(a), widen(b),
    )  # fmt: skip
    rows = _Rows.of(a, b, target if is_index else None, weight, ignore_index)
    _, s = compare_rows(rows.a, rows.b, None, valid=rows.valid)
    return rows.join(ce, rows.reduce(s, reduction, blend=blend), blend, dtype, reduction)


def nll_loss(
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    target: torch.Tensor,
    blend: Blend,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Joined:
    """Join two F.nll_loss: see cross_entropy, of log-probabilities instead of logits."""
    return _join_classes(log_p, log_q, target, blend, weight, ignore_index, reduction, is_log=True)


def _join_classes(
    a: torch.Tensor, b: torch.Tensor | None, target: torch.Tensor, blend: Blend, weight: torch.Tensor | None,
    ignore_index: int, reduction: str, *, is_log: bool,
) -> Joined:  # fmt: skip
    rows = _Rows.of(a, b, target, weight, ignore_index)
    nll, s = compare_rows(rows.a, rows.b, rows.target, valid=rows.valid, is_log=is_log)
    ce, kl = rows.reduce(nll, reduction), rows.reduce(s, reduction, blend=blend)
    return rows.join(ce, kl, blend, loss_dtype(a), reduction)


@dataclass(frozen=True)
class _Rows:
    """The logits as rows, and the coefficient that the cross entropy gives each of them."""

    a: torch.Tensor
    b: torch.Tensor | None
    target: torch.Tensor | None
    valid: torch.Tensor
    coefficient: torch.Tensor
    shape: torch.Size

    @classmethod
    def of(
        cls, a: torch.Tensor, b: torch.Tensor | None, target: torch.Tensor | None, weight: torch.Tensor | None,
        ignore_index: int,
    ) -> "_Rows":  # fmt: skip
        shape = a.shape[:1] + a.shape[2:] if a.dim() > 1 else a.shape[:0]
        if target is not None and target.shape != shape:
            raise SettingError(
                f"target: expected shape {tuple(shape)} for logits of {tuple(a.shape)}, got {tuple(target.shape)}. "
                f"Give each row of logits one class."
            )
        if b is None:
            shape = torch.Size((shape[0] // 2, *shape[1:]))
            target = target if target is None else target.chunk(2)[0]
        is_last = a.dim() > 2 and a.stride(1) == 1
        a, b = _as_rows(a, is_last=is_last), b if b is None else _as_rows(b, is_last=is_last)
        n = len(a) if b is not None else len(a) // 2
        inner = (n, *a.shape[2:])
        if target is None:
            valid = torch.ones(inner, dtype=torch.bool, device=a.device)
            return cls(a, b, None, valid, valid.to(wide(a.dtype)), shape)
        target = target.reshape(inner)
        valid = target != ignore_index
        coefficient = valid.to(wide(a.dtype))
        if weight is not None:
            coefficient = coefficient * weight[torch.where(valid, target.long(), 0)]
        return cls(a, b, target, valid, coefficient, shape)

    def join(self, ce: torch.Tensor, kl: torch.Tensor, blend: Blend, dtype: torch.dtype, reduction: str) -> Joined:
        """Put the parts together, and report them as means."""
        count, rows = self.coefficient.sum(), self.valid.sum()
        return join(ce, kl, blend, dtype, reduction=reduction, count=count, rows=rows)

    def reduce(self, rows: torch.Tensor, reduction: str, *, blend: Blend | None = None) -> torch.Tensor:
        """Reduce as the cross entropy does, or as the blend asks."""
        sums = blend is not None and blend.sums
        weighted = rows if sums else rows * self.coefficient
        if reduction == "none":
            return weighted.reshape(self.shape)
        if reduction == "sum" or (sums and reduction == "mean"):
            return weighted.sum()
        if reduction == "mean":
            return weighted.sum() / self.coefficient.sum()
        raise SettingError(f"reduction: expected none, mean or sum, got {reduction!r}. Choose one of them.")


def _as_rows(x: torch.Tensor, *, is_last: bool) -> torch.Tensor:
    """View (C), (N, C) or (N, C, d1, ...) as (N, C) or (N, C, D); as (N * D, C) where classes lie last in memory."""
    if x.dim() < 3:
        return x if x.dim() == 2 else x.unsqueeze(0)
    return x.movedim(1, -1).flatten(0, -2) if is_last else x.flatten(2)


def log_softmax(
    a: torch.Tensor,
    b: torch.Tensor,
    dim: int,
    blend: Blend,
    record: Callable[[torch.Tensor, torch.Tensor], object],
) -> torch.Tensor:
    """Return c = factor * [1/2 (log p + log q) - alpha/2 * S], S being that of its distribution, broadcast over dim.

    Any loss that is linear in -c with weights that sum to 1 in each row (NLL, gather, label smoothing, KL against a
    teacher) is then R-Drop's, with its own mask, shift and denominator.

    Args:
        a, b: logits.
        dim: of the classes.
        blend: how the parts are put together.
        record: called in each backward pass with ce and kl, weighted as the loss weighted the rows; not called where
            no row had weight.
    Raises:
        SettingError: S is to be summed; over how many rows the loss takes a mean is not known here.
    """
    if blend.sums:
        raise SettingError(
            'kl_reduction: expected "match" for a loss computed from log_softmax, got "sum". '
            "Use a loss that calls cross_entropy or nll_loss."
        )
    dtype = F.log_softmax(a.new_zeros(1), 0).dtype  # autocast has a say in it, on some devices
    a, b = a.movedim(dim, -1), b.movedim(dim, -1)
    rows_a, rows_b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    valid = torch.ones(len(rows_a), dtype=torch.bool, device=a.device)
    s = compare_rows(rows_a, rows_b, None, valid=valid)[1].reshape(*a.shape[:-1], 1)
    mean = mean_of_both(lambda x: F.log_softmax(x, -1), widen(a), widen(b))
    blended = mean - blend.alpha / 2 * s if blend.alpha else mean
    c: torch.Tensor = _Recorded.apply(blended, s, blend.alpha, record)  # type: ignore[no-untyped-call]
    return (blend.factor * c).to(dtype).movedim(-1, dim)


class _Recorded(torch.autograd.Function):
    """The identity; its gradient tells how the loss weighted the rows."""

    @staticmethod
    def forward(
        ctx: Any, c: torch.Tensor, s: torch.Tensor, alpha: float, record: Callable[[torch.Tensor, torch.Tensor], object]
    ) -> torch.Tensor:
        ctx.alpha, ctx.record = alpha, record
        ctx.save_for_backward(c, s)
        return c.view_as(c)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        c, s = ctx.saved_tensors
        with torch.no_grad():
            weights = -grad.sum(-1, keepdim=True)
            total = weights.sum()
            if total != 0:
                kl = (weights * s).sum() / total
                # a class of probability 0 has no gradient, and must not make it NaN
                ce = torch.where(grad == 0, 0, grad * c).sum() / total - ctx.alpha / 2 * kl
                ctx.record(ce, kl)
        return grad, None, None, None
