"""factor * (cross entropy + alpha/2 * KL): the sum in which every loss of R-Drop ends, and its dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Objective:
    """The weights of factor * (ce + alpha/2 * kl).

    Args:
        alpha: weight of the divergence, at least 0. Unitless.
        factor: 1, or 2 for the paper's scale.
        sums_kl: sum the divergence over the valid rows, unweighted, whatever the loss does. reduction="none" leaves the
            summing to the caller: then it is unweighted only.
    """

    alpha: float
    factor: float = 1.0
    sums_kl: bool = False


class RDropLoss(NamedTuple):
    """R-Drop's loss and its two terms.

    Args:
        loss: what to return to the caller: 0-dim, or with reduction="none" one value per row.
        ce: 1/2 (CE(a) + CE(b)), detached, 0-dim, float32 or float64: as reduction="mean" has it, whatever was asked.
        kl: the divergence, without alpha, likewise.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def combine_terms(
    ce: torch.Tensor,
    kl: torch.Tensor,
    objective: Objective,
    dtype: torch.dtype,
    *,
    reduction: str,
    count: Any,
    rows: Any,
) -> RDropLoss:
    """Weigh and add the two terms, each reduced as `reduction` says, and report their means.

    Args:
        count: what reduction="mean" divides by.
        rows: number of valid rows.
    """
    loss = ce + objective.alpha / 2 * kl if objective.alpha else ce  # 0 times an infinite kl would be NaN
    is_mean = reduction == "mean"
    mean_ce = ce.detach() if is_mean else ce.detach().sum() / count
    if is_mean and not objective.sums_kl:
        mean_kl = kl.detach()
    else:
        mean_kl = kl.detach().sum() / (rows if objective.sums_kl else count)
    return RDropLoss((objective.factor * loss).to(dtype), mean_ce, mean_kl)


def mean_over_passes(loss: Callable[..., torch.Tensor], a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    """Return 1/2 (loss(a) + loss(b))."""
    return 0.5 * (loss(a) + loss(b))


def upcast_half(x: Any) -> Any:
    """Return float16 and bfloat16 as float32, everything else as it is."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def loss_dtype(a: torch.Tensor, target: torch.Tensor | None = None) -> torch.dtype:
    """Return the dtype of torch's own loss: autocast computes all of them in float32."""
    dtype = a.dtype if target is None else torch.promote_types(a.dtype, target.dtype)
    if dtype.itemsize == 2 and torch.is_autocast_enabled(a.device.type):
        return torch.float32
    return dtype
