"""What can be asked for, checked when it is written down."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from surgery.errors import SettingError

Granularity = Literal["neuron", "element"]
Gradient = Literal["exact", "official"]


@dataclass(frozen=True)
class Mixout:
    """Mixout: Lee et al., ICLR 2020, arXiv 1909.11299, eq. 5 and 6.

    W_mix = w_pre + (w - w_pre) * m / (1 - p) with m ~ Bernoulli(1 - p), drawn anew at every call of a layer in training
    mode, so that E[W_mix] = w. The paper found 0.7 to 0.9 to work best.

    Args:
        p: probability in [0, 1] of taking w_pre. Unitless. 0 leaves the weights as they are, to the
            bit and with no random draw; dropout is replaced nevertheless.
        granularity: "neuron" draws one m for each input feature, as the authors' code; "element" one for each weight.
        gradient: "exact" is the derivative, dL/dw = dL/dW_mix * m / (1 - p). "official" leaves the division out, as the
            backward of the authors' code does, to reproduce their runs.
        replace_dropout: set the dropout of the layers that are mixed to 0, as the paper does.
    Raises:
        SettingError: p is out of range, or a choice is unknown.
    """

    p: float
    granularity: Granularity = "neuron"
    gradient: Gradient = "exact"
    replace_dropout: bool = True

    def __post_init__(self) -> None:
        if not _is_number(self.p) or not 0 <= self.p <= 1:
            raise SettingError(f"mixout: expected a probability p in [0, 1], got {self.p!r}. Give one such as 0.7.")
        _refuse_unknown("granularity", self.granularity, get_args(Granularity))
        _refuse_unknown("gradient", self.gradient, get_args(Gradient))
        if not isinstance(self.replace_dropout, bool):
            raise SettingError(
                f"replace_dropout: expected True or False, got {self.replace_dropout!r}. Choose one of them."
            )


@dataclass(frozen=True)
class Anchor:
    """Weight decay toward w_pre: the paper of Mixout, section 5, wdecay(w_pre, weight).

    The penalty 1/2 * weight * ||w - w_pre||^2, decoupled as AdamW's decay is: before every optimizer step that has a
    gradient for w, w <- w - lr * weight * (w - w_pre), with the lr of its parameter group.

    Args:
        weight: at least 0; the paper uses 0.01. Per unit of lr.
    Raises:
        SettingError: weight is negative or not finite.
    """

    weight: float

    def __post_init__(self) -> None:
        if not _is_number(self.weight) or not 0 <= self.weight < math.inf:
            raise SettingError(f"anchor: expected a weight of at least 0, got {self.weight!r}. Give one such as 0.01.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _refuse_unknown(option: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SettingError(f"{option}: expected {' or '.join(known)}, got {value!r}. Choose one of them.")
