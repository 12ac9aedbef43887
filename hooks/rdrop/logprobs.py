"""Log-probabilities of both passes in one, for losses that are put together by hand.

A loss that is affine in -log p, with a total weight of 1 for each row, is R-Drop's loss when it is applied to
c = 1/2 (log p + log q) - alpha / 2 * S, S being the row's symmetric KL: negative log-likelihood by gather or by index,
label smoothing, cross-entropy with a teacher. So c brings the KL in with just the mask, the shift and the denominator
that the loss has.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

from surgery.errors import SourceError

from ..compiling import eagerly
from .transparent import Plain

_AFFINE = frozenset(
    """__add__ __getitem__ __matmul__ __mul__ __neg__ __radd__ __rmatmul__ __rmul__ __rsub__ __sub__ __truediv__ add
    add_ bfloat16 cat chunk clone contiguous cpu cuda cumsum div div_ dot double einsum expand flatten float
    gather half index_select kl_div masked_fill masked_fill_ masked_select matmul mean movedim mul mul_ nansum
    narrow neg negative nll_loss permute reshape rsub select split squeeze stack sub sub_ subtract sum
    swapaxes t take_along_dim to transpose type type_as unbind unflatten unsqueeze view view_as where""".split()
)
"""Names of functions that keep an affine function affine, as long as what else they take wants no gradient."""
_PRODUCTS = frozenset("__matmul__ __mul__ __rmatmul__ __rmul__ dot einsum matmul mul mul_".split())
_SELECTING = frozenset(["sort", "topk"])
"""Those that pick rows of a loss; of log-probabilities they pick classes, for figures."""
_OF_THE_FIRST = frozenset(["__truediv__", "div", "div_", "kl_div", "nll_loss", "true_divide"])
"""Those that are affine in their first argument only."""


class LogProbs(Plain):
    """log q of the second pass, and what a loss is to see in its place.

    Args:
        join_nll: takes the arguments of nll_loss but the first, and returns R-Drop's loss.
        join: returns c.
    """

    join_nll: Callable[..., torch.Tensor]
    join: Callable[[], torch.Tensor]

    @staticmethod
    def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _apply(func, args, kwargs)


class JoinedRows(Plain):
    """A loss before its reduction, or a part of one, that has R-Drop in it already."""

    @staticmethod
    def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _apply_to_joined(func, args, kwargs)


def as_log_probs(
    values: torch.Tensor, join_nll: Callable[..., torch.Tensor], join: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Make log-probabilities wait for the loss that they meet."""
    probs = values.as_subclass(LogProbs)
    probs.join_nll, probs.join = join_nll, join
    return probs


@eagerly
def _apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is F.nll_loss and args and isinstance(args[0], LogProbs) and torch.is_grad_enabled():
        return args[0].join_nll(*args[1:], **kwargs)
    if not _is_affine(func, args, kwargs):
        return func(*args, **kwargs)
    is_in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
    swapped_args, swapped_kwargs = tree_map_only(
        LogProbs, lambda probs: probs.join().clone() if is_in_place else probs.join(), (args, kwargs)
    )
    return mark_joined(func(*swapped_args, **swapped_kwargs))


@eagerly
def _apply_to_joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    if _is_affine(func, args, kwargs) or getattr(func, "__name__", "") in _SELECTING:
        return mark_joined(result)
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_iter(result)):
        raise SourceError(
            "rdrop: expected a loss that is a weighted sum of its rows, or of log-probabilities, got "
            f"{getattr(func, '__name__', func)} of them. Train without rdrop."
        )
    return result


def _is_affine(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a function of log-probabilities is affine in them, and a gradient is wanted."""
    name = getattr(func, "__name__", "")
    if not torch.is_grad_enabled() or name not in _AFFINE:
        return False
    named = [kwargs[key] for key in sorted(kwargs, key=lambda key: key not in ("input", "self"))]
    trained = [isinstance(arg, torch.Tensor) and arg.requires_grad for arg in tree_iter([*args, *named])]
    if name in _OF_THE_FIRST and any(trained[1:]):
        return False
    return name not in _PRODUCTS or sum(trained) < 2


def mark_joined(result: Any) -> Any:
    """Mark what is not yet the loss itself, for what is done next."""
    return tree_map(
        lambda leaf: (
            leaf.as_subclass(JoinedRows)
            if type(leaf) is torch.Tensor and leaf.requires_grad and leaf.dim() > 0
            else leaf
        ),
        result,
    )
