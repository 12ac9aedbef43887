"""What was found of a metric, and the reading of the numbers that it is made of."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Found:
    """A metric of one trial.

    Args:
        value: may be NaN or Inf, as a script may say so.
        file: where it stands, relative to the trial's folder.
        rule: which of several values it is, in a few words.
    """

    value: float
    file: str
    rule: str


def as_number(value: Any) -> float | None:
    """Return a number of JSON, or of a cell of text; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
