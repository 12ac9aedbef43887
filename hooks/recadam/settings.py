"""class RecAdam: what is asked of it, checked; lambda(t); its flags of `surgery run`, and its words in reports."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import SettingError

from ..regularizer import Flag, Settings, is_number


@dataclass(frozen=True)
class RecAdam(Settings):
    """RecAdam: Chen et al., EMNLP 2020, arXiv 2004.12651, algorithm 1, around the steps of any torch optimizer.

    With lambda(t) = 1 / (1 + exp(-k (t - t0))), t counting optimizer steps from 1, a step that would take w to
    w + change takes it to

        w + lambda(t) * change - lr * (1 - lambda(t)) * gamma * (w - w_pre)

    where lr is that of the weight's parameter group in this step. So weights are recalled to w_pre at first, and the
    optimizer has its own way long after t0. All parameters with a pretrained value are recalled, biases, norms and
    embeddings too; new layers get the plain step. With Adam this is the paper's algorithm, with eta_t its lr; the
    authors' code takes (w - w_pre) after the change, and leaves weight decay out of it.

    Args:
        gamma: at least 0, in 1 / lr: the strength of the quadratic penalty. lr * gamma should stay below 1, where one
            step at lambda = 0 would put w at w_pre; the paper has 5000 beside an lr of 2e-5.
        k: above 0, per step: how fast lambda goes from 0 to 1. The paper tries 0.05 to 1.
        t0: at least 0, in steps: where lambda is 1/2. The paper tries 100 to 1000.
    Raises:
        SettingError: a number is out of range.
    """

    name = "recadam"
    number = "gamma"
    paper = "2004.12651"
    help = "Recall pretrained weights at first, then let the optimizer learn."
    acts_on = "parameters"
    verb = "recalled"
    flags = (
        Flag("k", float, "How fast RecAdam lets go, per step."),
        Flag("t0", float, "The optimizer step at which RecAdam has half let go."),
    )
    missing = "no optimizer's step recalled a weight to w_pre"
    idle_facts = {"recalled": 0, "recadam_t": 0}
    idle_report = {"recadam_t": None, "recadam_lambda": None}

    gamma: float = 5000.0
    k: float = 0.5
    t0: float = 250

    def __post_init__(self) -> None:
        if not is_number(self.gamma) or not 0 <= self.gamma < math.inf:
            raise SettingError(f"recadam: expected a gamma of at least 0, got {self.gamma!r}. Give one such as 5000.")
        if not is_number(self.k) or not 0 < self.k < math.inf:
            raise SettingError(f"k: expected a rate above 0, got {self.k!r}. Give one such as 0.5.")
        if not is_number(self.t0) or not 0 <= self.t0 < math.inf:
            raise SettingError(f"t0: expected a number of steps of at least 0, got {self.t0!r}. Give one such as 250.")

    def refuse_beside(self, others: Sequence[Settings]) -> None:
        if any(one.name == "anchor" for one in others):
            raise SettingError(
                "recadam: expected no anchor beside it, got both, which pull to the same place. Leave one of them out."
            )

    def anneal(self, t: int) -> float:
        """Return lambda(t), in [0, 1]: the share that step t takes of the optimizer's own change."""
        x = self.k * (t - self.t0)
        return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))

    def lines(self, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
        t = facts["recadam_t"]
        rate = f"lambda(t) = 1 / (1 + exp(-{self.k:g} (t - {self.t0:g})))"
        now = f"lambda({t}) = {self.anneal(t):.3g}; in {facts['recalled']} optimizer steps so far"
        return [("recadam", f"gamma = {self.gamma:g}, {rate}, {now}")]

    def announcement(self, entry: Mapping[str, Any]) -> str:  # noqa: ARG002
        return f"RecAdam (gamma {self.gamma:g}, k {self.k:g}, t0 {self.t0:g})"

    @classmethod
    def summary(cls, entry: Mapping[str, Any]) -> list[str]:
        if entry["recadam_t"] is None:
            return []
        return [f"RecAdam at step {entry['recadam_t']:,}, lambda {entry['recadam_lambda']:.3g}"]
