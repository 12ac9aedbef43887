"""Figures of a model over time, for the JSONL file beside the report: bounded, by leaving out every second row."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from surgery.errors import SurgeryError

from ...refusals import handled

_ROWS = 512
_SHARE = 0.002
"""Of the time that passes: what measuring the distance may take, for it reads all weights."""


class History:
    """Rows at equal intervals, which double whenever there are too many of them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._begun = time.monotonic()
        self._interval = self._due = 0.0
        self._distance_due = 0.0

    def add(self, figures: Mapping[str, Any], distance: Callable[[], float] | None) -> None:
        """Add a row if one is due, and figures are others than in the last one.

        Args:
            figures: of the model.
            distance: measures it.
        """
        now = time.monotonic()
        if now < self._due or (self.rows and self.rows[-1].items() >= figures.items()):
            return
        row = {"seconds": round(now - self._begun, 1), **figures}
        if distance is not None and now >= self._distance_due:
            with handled(), suppress(SurgeryError):  # another tool has taken the weights away
                row["distance"] = distance()
            self._distance_due = now + (time.monotonic() - now) / _SHARE
        self.rows.append(row)
        if len(self.rows) >= _ROWS:
            self._interval = 2 * max(self._interval, (now - self._begun) / _ROWS)
            self.rows = self.rows[::2]
        self._due = now + self._interval
