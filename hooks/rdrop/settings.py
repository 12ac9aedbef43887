"""class RDrop: what is asked of it, checked; its flags of `surgery run`, and its words in reports."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from surgery.errors import SettingError

from ..regularizer import MISSED_STEPS, Flag, Settings, is_number, refuse_unknown

Passes = Literal["auto", "doubled", "two"]
Scale = Literal["mean", "paper"]
Reduction = Literal["match", "sum"]


@dataclass(frozen=True)
class RDrop(Settings):
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

    name = "rdrop"
    number = "alpha"
    paper = "2106.14448"
    help = "Two passes; the loss holds their outputs together."
    acts_on = None
    flags = (Flag("every", int, "R-Drop at each N-th optimizer step only."),)
    missing = "its KL reached no loss, or was 0 in all steps"
    idle_facts = {"fired": 0, "missed": 0, "unjoined": ()}
    idle_report = {"rdrop_fired": 0, "kl": None, "ce": None, "kl_mean": None, "ce_mean": None}

    alpha: float
    every: int = 1
    passes: Passes = "auto"
    scale: Scale = "mean"
    kl_reduction: Reduction = "match"

    def __post_init__(self) -> None:
        if not is_number(self.alpha) or not 0 <= self.alpha < math.inf:
            raise SettingError(f"rdrop: expected an alpha of at least 0, got {self.alpha!r}. Give one such as 1.0.")
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise SettingError(f"every: expected a whole number of at least 1, got {self.every!r}. Give one such as 1.")
        refuse_unknown("passes", self.passes, get_args(Passes))
        refuse_unknown("scale", self.scale, get_args(Scale))
        refuse_unknown("kl_reduction", self.kl_reduction, get_args(Reduction))

    def lines(self, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
        every = "every step" if self.every == 1 else f"one step in {self.every}"
        options = (", the paper's scale" if self.scale == "paper" else "") + (
            ", KL summed" if self.kl_reduction == "sum" else ""
        )
        fired = f"in the loss of {facts['fired']} forwards so far"
        said = [("rdrop", f"alpha = {self.alpha:g}, {every}, passes {self.passes}{options}; {fired}")]
        if facts["missed"]:
            said.append(("NOT IN", f"{facts['missed']} {MISSED_STEPS}"))
        if facts["unjoined"]:
            said.append(("not joined", f"{', '.join(facts['unjoined'])}: no formula; as the second pass has it"))
        return said

    def announcement(self, entry: Mapping[str, Any]) -> str:  # noqa: ARG002
        return f"R-Drop (alpha {self.alpha:g})"

    @classmethod
    def summary(cls, entry: Mapping[str, Any]) -> list[str]:
        said = [f"R-Drop in {entry['rdrop_fired']:,} of them"] if entry["rdrop_fired"] else []
        # neither, if the loss was that of another model, which this one feeds
        if entry["kl"] is not None:
            said.append(f"KL {entry['kl']:.4g}, CE {entry['ce']:.4g}")
        if entry.get("mse") is not None:
            said.append(f"MSE of the passes {entry['pair_mse']:.4g}, MSE {entry['mse']:.4g}")
        return said
