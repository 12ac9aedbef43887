"""What can be asked for, checked when it is written down."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from surgery.errors import SettingError

Granularity = Literal["neuron", "element"]
Gradient = Literal["exact", "official"]
Passes = Literal["auto", "doubled", "two"]
Scale = Literal["mean", "paper"]
Reduction = Literal["match", "sum"]


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


@dataclass(frozen=True)
class RDrop:
    """R-Drop: Liang et al., NeurIPS 2021, arXiv 2106.14448, eq. 4.

    Every training forward is made twice, with other dropout, and the loss function that the logits a and b of the two
    passes reach returns mean(CE(a), CE(b)) + alpha / 2 * S, with S = 1/2 [KL(p||q) + KL(q||p)], p = softmax(a) and
    q = softmax(b). That is half of the paper's loss, at the same alpha: the loss stays on the scale of the learning
    rate. S has the mask, the shift and the denominator of the CE it joins. For a regression it is the MSE between the
    two outputs (appendix A.4); for binary cross-entropy the KL of each Bernoulli variable.

    The alpha of the authors' code: fairseq and BERT sum the two CEs, as the paper does, so that alpha is the same here.
    Their README and RoBERTa average them with the same KL: alpha there is twice that here. Their GLUE code sums the
    KL over the batch: kl_reduction="sum". Their ViT leaves out the 1/2: its alpha is half.

    Args:
        alpha: at least 0. Unitless; the paper uses 0.1 to 5. 0 trains on the two passes without S.
        every: fire at each `every`-th training step, a step being an optimizer's; other steps cost one pass.
        passes: "doubled" runs one forward on the batch twice over, "two" two forwards. "auto" doubles where this is
            sure to be the same: labels given to a model of transformers, nothing mixed, no BatchNorm.
        scale: "paper" returns the paper's loss, which is twice as large.
        kl_reduction: "match" reduces S as the CE it joins; "sum" sums it over the rows.
    Raises:
        SettingError: a number is out of range, or a choice is unknown.
    """

    alpha: float
    every: int = 1
    passes: Passes = "auto"
    scale: Scale = "mean"
    kl_reduction: Reduction = "match"

    def __post_init__(self) -> None:
        if not _is_number(self.alpha) or not 0 <= self.alpha < math.inf:
            raise SettingError(f"rdrop: expected an alpha of at least 0, got {self.alpha!r}. Give one such as 1.0.")
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise SettingError(f"every: expected a whole number of at least 1, got {self.every!r}. Give one such as 1.")
        _refuse_unknown("passes", self.passes, get_args(Passes))
        _refuse_unknown("scale", self.scale, get_args(Scale))
        _refuse_unknown("kl_reduction", self.kl_reduction, get_args(Reduction))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _refuse_unknown(option: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SettingError(f"{option}: expected {' or '.join(known)}, got {value!r}. Choose one of them.")
