"""F.cross_entropy, nll_loss and log_softmax of two passes: 1/2 (CE(a) + CE(b)) + alpha/2 * 1/2 [KL(p||q) + KL(q||p)].

Liang et al., arXiv 2106.14448, eq. 4. a and b are the outputs of two forward passes of one batch. The divergence is
reduced as the cross entropy is: same rows, same row weights, same denominator. Computed in float32 at least; the loss
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
from .objective import Objective, RDropLoss, combine_terms, loss_dtype, mean_over_passes, upcast_half
from .rowwise import accumulation_dtype, compare_rows


def cross_entropy(
    a: torch.Tensor,
    b: torch.Tensor | None,
    target: torch.Tensor,
    objective: Objective,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> RDropLoss:
    """Return R-Drop's loss of two F.cross_entropy.

    With class indices and no smoothing, the gradient is the only tensor of the logits' size that is allocated.

    Args:
        a, b: logits, (N, C), (C) or (N, C, d1, ...). b None: a is (2N, ...) and target of 2N, the two passes one after
            the other with equal targets; the result is that of N rows.
        target: class indices, or probabilities of a's shape.
        objective: weights of the two terms.
        weight, ignore_index, reduction, label_smoothing: as F.cross_entropy's.
    Raises:
        SettingError: target has another shape than the logits, or reduction is unknown.
    """
    if target.shape != a.shape and label_smoothing == 0:
        return _class_index_loss(a, b, target, objective, weight, ignore_index, reduction, is_log=False)
    dtype = loss_dtype(a)
    if b is None:
        (a, b), target = a.chunk(2), target.chunk(2)[0]
    options: dict[str, Any] = {
        "weight": upcast_half(weight), "ignore_index": ignore_index, "label_smoothing": label_smoothing,
    }  # fmt: skip
    is_index = target.shape != a.shape
    wide_target = target if is_index else target.to(accumulation_dtype(target.dtype))
    ce = mean_over_passes(
        lambda x: F.cross_entropy(x, wide_target, reduction=reduction, **options),
        upcast_half(a), upcast_half(b),
    )  # fmt: skip
    rows = _Rows.from_logits(a, b, target if is_index else None, weight, ignore_index)
    _, s = compare_rows(rows.a, rows.b, None, valid=rows.valid)
    return rows.to_loss(ce, rows.reduce(s, reduction, objective=objective), objective, dtype, reduction)


def nll_loss(
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    target: torch.Tensor,
    objective: Objective,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> RDropLoss:
    """Return R-Drop's loss of two F.nll_loss: as cross_entropy, of log-probabilities instead of logits."""
    return _class_index_loss(log_p, log_q, target, objective, weight, ignore_index, reduction, is_log=True)


def _class_index_loss(
    a: torch.Tensor, b: torch.Tensor | None, target: torch.Tensor, objective: Objective, weight: torch.Tensor | None,
    ignore_index: int, reduction: str, *, is_log: bool,
) -> RDropLoss:  # fmt: skip
    rows = _Rows.from_logits(a, b, target, weight, ignore_index)
    nll, s = compare_rows(rows.a, rows.b, rows.target, valid=rows.valid, is_log=is_log)
    ce, kl = rows.reduce(nll, reduction), rows.reduce(s, reduction, objective=objective)
    return rows.to_loss(ce, kl, objective, loss_dtype(a), reduction)


@dataclass(frozen=True)
class _Rows:
    """The logits as rows of classes, and the weight that the cross entropy gives each row."""

    a: torch.Tensor
    b: torch.Tensor | None
    target: torch.Tensor | None
    valid: torch.Tensor
    coefficient: torch.Tensor
    shape: torch.Size

    @classmethod
    def from_logits(
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
            return cls(a, b, None, valid, valid.to(accumulation_dtype(a.dtype)), shape)
        target = target.reshape(inner)
        valid = target != ignore_index
        coefficient = valid.to(accumulation_dtype(a.dtype))
        if weight is not None:
            coefficient = coefficient * weight[torch.where(valid, target.long(), 0)]
        return cls(a, b, target, valid, coefficient, shape)

    def to_loss(
        self, ce: torch.Tensor, kl: torch.Tensor, objective: Objective, dtype: torch.dtype, reduction: str
    ) -> RDropLoss:
        """Combine the reduced terms; report them as means over the rows."""
        count, rows = self.coefficient.sum(), self.valid.sum()
        return combine_terms(ce, kl, objective, dtype, reduction=reduction, count=count, rows=rows)

    def reduce(self, rows: torch.Tensor, reduction: str, *, objective: Objective | None = None) -> torch.Tensor:
        """Reduce values of rows as the cross entropy does, or unweighted where the objective sums the KL."""
        sums = objective is not None and objective.sums_kl
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
    objective: Objective,
    record: Callable[[torch.Tensor, torch.Tensor], object],
) -> torch.Tensor:
    """Return c = factor * [1/2 (log p + log q) - alpha/2 * S], S being the divergence of the row, broadcast over dim.

    Any loss that is linear in -c with weights that sum to 1 in each row (NLL, gather, label smoothing, KL against a
    teacher) is then R-Drop's, with its own mask, shift and denominator.

    Args:
        a, b: logits.
        dim: of the classes.
        objective: weights of the two terms.
        record: called in each backward pass with ce and kl, weighted as the loss weighted the rows; not called where
            no row had weight.
    Raises:
        SettingError: S is to be summed; over how many rows the loss takes a mean is not known here.
    """
    if objective.sums_kl:
        raise SettingError(
            'kl_reduction: expected "match" for a loss computed from log_softmax, got "sum". '
            "Use a loss that calls cross_entropy or nll_loss."
        )
    dtype = F.log_softmax(a.new_zeros(1), 0).dtype  # autocast has a say in it, on some devices
    a, b = a.movedim(dim, -1), b.movedim(dim, -1)
    rows_a, rows_b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    valid = torch.ones(len(rows_a), dtype=torch.bool, device=a.device)
    s = compare_rows(rows_a, rows_b, None, valid=valid)[1].reshape(*a.shape[:-1], 1)
    mean = mean_over_passes(lambda x: F.log_softmax(x, -1), upcast_half(a), upcast_half(b))
    combined = mean - objective.alpha / 2 * s if objective.alpha else mean
    c = record_row_weights(combined, s, objective, record)
    return (objective.factor * c).to(dtype).movedim(-1, dim)


def record_row_weights(
    c: torch.Tensor, s: torch.Tensor, objective: Objective, record: Callable[[torch.Tensor, torch.Tensor], object]
) -> torch.Tensor:
    """Return c, in whose backward pass `record` is called with ce and kl; s is (..., 1) for c of (..., C)."""
    same: torch.Tensor = _RecordRowWeights.apply(c, s, objective.alpha, record)  # type: ignore[no-untyped-call]
    return same


class _RecordRowWeights(torch.autograd.Function):
    """The identity, whose backward reads from the gradient how the loss weighted the rows."""

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
