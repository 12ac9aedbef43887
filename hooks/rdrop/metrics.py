"""What R-Drop has measured: its two terms, kept where they are until somebody asks, for reading costs a wait."""

from typing import Any

import torch


class Measured:
    """The cross-entropy and the KL of each forward, both as the loss has them, without alpha.

    Args of `add` are scalars; a forward may have several, whose mean counts.
    """

    def __init__(self) -> None:
        self._pending: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._count = 0
        self.fired = 0
        """Forwards that the KL was a part of."""

    def add(self, ce: torch.Tensor, kl: torch.Tensor) -> None:
        """Take in the terms of one loss."""
        self._pending.append(torch.stack([kl.detach().double(), ce.detach().double()]))

    def fire(self) -> None:
        """Count a forward whose loss has the KL in it."""
        self.fired += 1

    def settle(self) -> None:
        """End a forward."""
        if not self._pending:
            return
        self._last = torch.stack(self._pending).mean(0)
        self._sum = self._last if self._sum is None else self._sum + self._last
        self._pending = []
        self._count += 1

    def last(self) -> dict[str, Any]:
        """Return the last values, None where nothing has been measured."""
        self.settle()
        kl, ce = [None, None] if self._last is None else self._last.tolist()
        return {"kl": kl, "ce": ce, "rdrop_fired": self.fired}

    def read(self) -> dict[str, Any]:
        """Return the last values and the means since they were last read; None where nothing has been measured."""
        last = self.last()
        kl, ce = [None, None] if self._sum is None else (self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        return {"kl": last["kl"], "ce": last["ce"], "kl_mean": kl, "ce_mean": ce, "rdrop_fired": self.fired}
