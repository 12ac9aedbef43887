"""R-Drop's loss of one call of a fused head in each pass: divergence.cross_entropy, of hidden states."""

from collections.abc import Callable
from typing import Any

import torch

from surgery.errors import SettingError

from .divergence import record_row_weights
from .fused import fused_rows, fused_sum
from .fused_calls import HeadCall
from .logprobs import as_fused_log_probs, as_unreduced_loss
from .objective import Objective, RDropLoss

Record = Callable[[torch.Tensor, torch.Tensor], object]
"""Takes ce and kl."""


def result_of_head(
    first: HeadCall, second: HeadCall, objective: Objective, record: Record, refuse: Callable[[str], None]
) -> Any:
    """Return what the head returns, with R-Drop's loss, or its log-probabilities, in the place of its own.

    Args:
        record: is called now, or in the backward pass that weighs log-probabilities.
        refuse: is called with what is made of log-probabilities and has no formula.
    """
    if second.reduction == "log_probs":
        c = fused_log_probs(first, second, objective, record)
        own, *figures = second.call_own()
        return as_fused_log_probs(c, own, refuse), *figures
    loss, ce, kl = fused_loss(first, second, objective)
    record(ce, kl)
    return second.wrap(as_unreduced_loss(loss) if second.reduction == "none" else loss)


def fused_loss(first: HeadCall, second: HeadCall, objective: Objective) -> RDropLoss:
    """Return R-Drop's loss of two calls whose reduction is known: one value, or (N) with reduction="none".

    Raises:
        SettingError: the passes do not fit each other.
    """
    _check_shapes(first, second)
    passes = first.scored, second.scored, second.target, second.scaling
    rows = max(1, len(second.target))
    if second.reduction == "none":
        nll, s = fused_rows(*passes)
        loss = nll + objective.alpha / 2 * s if objective.alpha else nll
    else:
        is_mean = second.reduction == "mean"
        count = second.count if is_mean else 1
        # the denominator is that of both terms, but for a divergence that is summed
        kl_weight = objective.alpha / 2 * (count if is_mean and objective.sums_kl else 1) if objective.alpha else 0.0
        total, nll, s = fused_sum(*passes, kl_weight)
        loss = total / count
    return RDropLoss(objective.factor * loss, nll.detach().sum() / rows, s.detach().sum() / rows)


def fused_log_probs(first: HeadCall, second: HeadCall, objective: Objective, record: Record) -> torch.Tensor:
    """Return c = factor * [1/2 (log p[y] + log q[y]) - alpha/2 * S] of each token, as divergence.log_softmax does.

    Args:
        record: called in each backward pass with ce and kl, weighted as the loss weighted the tokens.
    Raises:
        SettingError: S is to be summed, or the passes do not fit each other.
    """
    if objective.sums_kl:
        raise SettingError(
            f'kl_reduction: expected "match" for a loss computed from log-probabilities, got "sum" with {second.name}. '
            "Leave it out, or turn the fused head off."
        )
    _check_shapes(first, second)
    nll, s = fused_rows(first.scored, second.scored, second.target, second.scaling)
    c = -nll - objective.alpha / 2 * s if objective.alpha else -nll
    return objective.factor * record_row_weights(c.unsqueeze(1), s.unsqueeze(1), objective, record).squeeze(1)


def _check_shapes(first: HeadCall, second: HeadCall) -> None:
    a, b = (tuple(call.scored.hidden.shape) for call in (first, second))
    if a != b:
        raise SettingError(
            f"rdrop: expected hidden states of one shape in both passes, got {a} and {b} in {second.name}. The model "
            "must take the same way twice."
        )
