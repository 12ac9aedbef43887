"""torch.Tensor subclass for log_softmax outputs that puts both passes' log-probabilities into a loss written by hand.

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
from .loss_calls import LEAVE_OUT
from .transparent import TransparentTensor, is_clone_in_ddp_sink

_AFFINE = frozenset(
    """__add__ __getitem__ __matmul__ __mul__ __neg__ __radd__ __rmatmul__ __rmul__ __rsub__ __sub__ __truediv__ add
    add_ bfloat16 cat chunk clone contiguous cpu cuda cumsum div div_ dot double einsum expand flatten float
    gather half index_select kl_div masked_fill masked_fill_ masked_scatter masked_select matmul mean movedim mul mul_
    nansum narrow neg negative nll_loss permute reshape rsub select split squeeze stack sub sub_ subtract sum
    swapaxes t take_along_dim to transpose type type_as unbind unflatten unsqueeze view view_as where""".split()
)
"""Names of torch functions that keep an affine function affine, as long as no other argument requires grad."""
_PRODUCTS = frozenset("__matmul__ __mul__ __rmatmul__ __rmul__ dot einsum matmul mul mul_".split())
_SELECTING = frozenset(["sort", "topk"])
"""Those that select rows of a loss. Of log-probabilities they select classes, which metrics do and no loss."""
_AFFINE_IN_FIRST_ONLY = frozenset(["__truediv__", "div", "div_", "kl_div", "nll_loss", "true_divide"])
"""Those of _AFFINE that are affine in their first argument only."""


class PairedLogProbs(TransparentTensor):
    """log q of the second pass; in the functions of a loss, c takes its place.

    Args:
        make_nll_loss: takes the arguments of nll_loss but the first, and returns R-Drop's loss.
        make_combined: returns c, the combined log-probabilities.
    """

    make_nll_loss: Callable[..., torch.Tensor]
    make_combined: Callable[[], torch.Tensor]

    @staticmethod
    def apply_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _apply_to_log_probs(func, args, kwargs)


class UnreducedLoss(TransparentTensor):
    """A loss before its reduction, or a term of one, that has the KL in it already."""

    @staticmethod
    def apply_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _apply_to_unreduced_loss(func, args, kwargs)


class FusedLogProbs(TransparentTensor):
    """c of the labels, which a fused head returns in place of its log-probabilities; those are beside it as `own`.

    A loss is made of c. What makes no loss, such as a metric, gets `own`.

    Args:
        own: the head's log-probabilities, of the second pass.
        refuse: is called where a loss is made that is not affine; raises, or has it made of `own`.
    """

    own: torch.Tensor
    refuse: Callable[[str], None]

    @staticmethod
    def apply_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _apply_to_fused_log_probs(func, args, kwargs)


def as_fused_log_probs(c: torch.Tensor, own: torch.Tensor, refuse: Callable[[str], None]) -> torch.Tensor:
    """Put c in the place of a fused head's own log-probabilities."""
    probs = c.as_subclass(FusedLogProbs)
    probs.own, probs.refuse = own.to(c.dtype), refuse
    return probs


def as_log_probs(
    values: torch.Tensor, make_nll_loss: Callable[..., torch.Tensor], make_combined: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Turn log-probabilities of the second pass into those of both, for the loss that is computed from them."""
    probs = values.as_subclass(PairedLogProbs)
    probs.make_nll_loss, probs.make_combined = make_nll_loss, make_combined
    return probs


@eagerly
def _apply_to_log_probs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is F.nll_loss and args and isinstance(args[0], PairedLogProbs) and torch.is_grad_enabled():
        return args[0].make_nll_loss(*args[1:], **kwargs)
    if not _is_affine(func, args, kwargs):
        return func(*args, **kwargs)

    def combine(probs: PairedLogProbs) -> torch.Tensor:
        return probs.make_combined().clone() if _is_in_place(func.__name__) else probs.make_combined()

    combined_args, combined_kwargs = tree_map_only(PairedLogProbs, combine, (args, kwargs))
    return as_unreduced_loss(func(*combined_args, **combined_kwargs))


@eagerly
def _apply_to_unreduced_loss(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    if _is_affine(func, args, kwargs) or getattr(func, "__name__", "") in _SELECTING:
        return as_unreduced_loss(result)
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_iter(result)):
        raise SourceError(
            "rdrop: expected a loss that is a weighted sum of its rows, or of log-probabilities, got "
            f"{getattr(func, '__name__', func)} of them: {LEAVE_OUT}"
        )
    return result


@eagerly
def _apply_to_fused_log_probs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    if name in _OF_THE_GRAPH:
        return func(*args, **kwargs)
    is_affine = is_clone_in_ddp_sink(func) or _is_affine(func, args, kwargs)
    probs = next(leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, FusedLogProbs))
    combined = func(*args, **kwargs) if is_affine else None
    if is_affine and not isinstance(combined, FusedLogProbs) and _is_in_place(name) and combined is args[0]:
        return combined  # an ordinary tensor was written to: to do it for both would do it twice
    own_args, own_kwargs = tree_map_only(FusedLogProbs, lambda leaf: leaf.own, (args, kwargs))
    own = func(*own_args, **own_kwargs)
    if is_affine:
        return tree_map(lambda c, mine: _beside(c, mine, probs.refuse), combined, own)
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_iter(own)):
        probs.refuse(
            f"rdrop: expected a loss that is a weighted sum of log-probabilities, got {name} of them: R-Drop has no "
            "formula for DFT, DPO, GRPO and reward losses. Leave rdrop out, or train with another loss, such as "
            'loss_type="nll" in TRL\'s SFTTrainer.'
        )
    return own


_OF_THE_GRAPH = frozenset(["backward", "grad", "register_hook", "retain_grad"])
"""Names of functions that are about the gradient, which is that of c."""


def _beside(c: Any, own: Any, refuse: Callable[[str], None]) -> Any:
    """Keep `own` with a result that is not yet the scalar loss."""
    is_plain = not isinstance(c, torch.Tensor) or isinstance(c, FusedLogProbs) or c.dim() == 0
    return c if is_plain else as_fused_log_probs(c, own, refuse)


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_affine(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether grad mode is on and a function of log-probabilities is affine in them."""
    name = getattr(func, "__name__", "")
    if not torch.is_grad_enabled() or name not in _AFFINE:
        return False
    named = [kwargs[key] for key in sorted(kwargs, key=lambda key: key not in ("input", "self"))]
    trained = [isinstance(arg, torch.Tensor) and arg.requires_grad for arg in tree_iter([*args, *named])]
    if name in _AFFINE_IN_FIRST_ONLY and any(trained[1:]):
        return False
    return name not in _PRODUCTS or sum(trained) < 2


def as_unreduced_loss(result: Any) -> Any:
    """Mark the tensors in a result that are not yet the scalar loss, so that further functions are checked."""
    return tree_map(
        lambda leaf: (
            leaf.as_subclass(UnreducedLoss)
            if type(leaf) is torch.Tensor and leaf.requires_grad and leaf.dim() > 0
            else leaf
        ),
        result,
    )
