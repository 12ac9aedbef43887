"""class Mixout: what is asked of it, checked; its flags of `surgery run`, and its words in reports."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from surgery.errors import SettingError

from ..regularizer import MISSED_STEPS, Flag, Settings, first_of, is_number, refuse_unknown

Granularity = Literal["neuron", "element"]
Gradient = Literal["exact", "official"]
_UNIT = {"neuron": "input feature", "element": "element"}


@dataclass(frozen=True)
class Mixout(Settings):
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

    name = "mixout"
    number = "p"
    paper = "1909.11299"
    help = "Mix pretrained weights back in at every forward pass."
    acts_on = "layers"
    verb = "mixed"
    flags = (Flag("granularity", get_args(Granularity), "What one mask value covers."),)
    missing = "no layer with pretrained weights was trained, so that none was mixed"
    idle_facts = {"uncalled": (), "uncalled_ties": (), "replaced": (), "kept": (), "unmixed": 0}
    idle_report = {"mixed": 0}
    counts = ("mixed",)

    p: float
    granularity: Granularity = "neuron"
    gradient: Gradient = "exact"
    replace_dropout: bool = True

    def __post_init__(self) -> None:
        if not is_number(self.p) or not 0 <= self.p <= 1:
            raise SettingError(f"mixout: expected a probability p in [0, 1], got {self.p!r}. Give one such as 0.7.")
        refuse_unknown("granularity", self.granularity, get_args(Granularity))
        refuse_unknown("gradient", self.gradient, get_args(Gradient))
        if not isinstance(self.replace_dropout, bool):
            raise SettingError(
                f"replace_dropout: expected True or False, got {self.replace_dropout!r}. Choose one of them."
            )

    @property
    def is_per_batch(self) -> bool:
        return self.is_mixing

    @property
    def is_mixing(self) -> bool:
        """Weights are mixed; where p is 0, dropout alone is changed."""
        return self.p > 0

    def lines(self, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
        unit = _UNIT[self.granularity]
        said = [("mixout", f"p = {self.p:g}, one mask value per {unit}, {self.gradient} gradient")]
        if facts["unmixed"]:
            said.append(("NOT MIXED", f"in {facts['unmixed']} {MISSED_STEPS}"))
        return said

    def lines_below(self, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
        said = []
        if uncalled := facts["uncalled"]:
            reached = f"{len(uncalled)} (no forward in training reached them)"
            said.append(("NOT CALLED", f"{reached}: {first_of(uncalled)}"))
        if ties := facts["uncalled_ties"]:
            said.append(
                ("NOT CALLED", f"{len(ties)} (tied: mixed only where other layers are called): {first_of(ties)}")
            )
        for what, rates in (("set to 0", facts["replaced"]), ("kept", facts["kept"])):
            if rates:
                said.append(("dropout", f"{len(rates)} {what}: {first_of(rates)}"))
        return said

    def announcement(self, entry: Mapping[str, Any]) -> str:
        return f"{entry['mixed']} weights mixed (p {self.p:g})"
