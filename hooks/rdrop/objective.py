"""How R-Drop's parts are put together, and in which dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Blend:
    """How the parts are put together: factor * (ce + alpha/2 * kl).

    Args:
        alpha: weight of the divergence, at least 0. Unitless.
        factor: 1, or 2 for the paper's scale.
        sums: sum the divergence over the valid rows, unweighted, whatever the loss does. reduction="none" leaves the
            summing to the caller: then it is unweighted only.
    """

    alpha: float
    factor: float = 1.0
    sums: bool = False


class Joined(NamedTuple):
    """What a loss function gives.

    Args:
        loss: what to return to the caller: 0-dim, or with reduction="none" one value per row.
        ce: 1/2 (CE(a) + CE(b)), detached, 0-dim, float32 or float64: as reduction="mean" has it, whatever was asked.
        kl: the divergence, without alpha, likewise.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def mean_of_both(loss: Callable[..., torch.Tensor], a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    """Return 1/2 (loss(a) + loss(b))."""
    return 0.5 * (loss(a) + loss(b))


def widen(x: Any) -> Any:
    """Return half precision as float32, everything else as it is."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def loss_dtype(a: torch.Tensor, target: torch.Tensor | None = None) -> torch.dtype:
    """Return the dtype of torch's own loss: autocast computes all of them in float32."""
    dtype = a.dtype if target is None else torch.promote_types(a.dtype, target.dtype)
    if dtype.itemsize == 2 and torch.is_autocast_enabled(a.device.type):
        return torch.float32
    return dtype


def join(
    ce: torch.Tensor, kl: torch.Tensor, blend: Blend, dtype: torch.dtype, *, reduction: str, count: Any, rows: Any
) -> Joined:
    """Put the parts together.

    Args:
        count: what reduction="mean" divides by.
        rows: how many valid rows.
    """
    loss = ce + blend.alpha / 2 * kl if blend.alpha else ce  # 0 times an infinite kl would be NaN
    is_mean = reduction == "mean"
    mean_ce = ce.detach() if is_mean else ce.detach().sum() / count
    mean_kl = kl.detach() if is_mean and not blend.sums else kl.detach().sum() / (rows if blend.sums else count)
    return Joined((blend.factor * loss).to(dtype), mean_ce, mean_kl)
