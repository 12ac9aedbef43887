"""class Anchor: what is asked of it, checked; and its words in reports."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import SettingError

from ..regularizer import Settings, is_number


@dataclass(frozen=True)
class Anchor(Settings):
    """Weight decay toward w_pre: the paper of Mixout, section 5, wdecay(w_pre, weight).

    The penalty 1/2 * weight * ||w - w_pre||^2, decoupled as AdamW's decay is: before every optimizer step that has a
    gradient for w, w <- w - lr * weight * (w - w_pre), with the lr of its parameter group.

    Args:
        weight: at least 0; the paper uses 0.01. Per unit of lr.
    Raises:
        SettingError: weight is negative or not finite.
    """

    name = "anchor"
    number = "weight"
    paper = "1909.11299"
    help = "Decay weights toward the pretrained ones."
    acts_on = "layers"
    verb = "anchored"
    missing = "no optimizer's step drew a weight toward w_pre"
    idle_facts = {"anchored": 0}

    weight: float

    def __post_init__(self) -> None:
        if not is_number(self.weight) or not 0 <= self.weight < math.inf:
            raise SettingError(f"anchor: expected a weight of at least 0, got {self.weight!r}. Give one such as 0.01.")

    def lines(self, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
        steps = f"in {facts['anchored']} optimizer steps so far"
        advice = "set the optimizer's weight_decay for these weights to 0"
        return [("anchor", f"weight {self.weight:g}, {steps}; {advice}")]

    def announcement(self, entry: Mapping[str, Any]) -> str:  # noqa: ARG002
        return f"anchor ({self.weight:g})"
