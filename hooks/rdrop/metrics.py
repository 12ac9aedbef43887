"""Means of R-Drop's cross entropy and KL, kept as tensors on the device: .tolist() would synchronize with it."""

from typing import Any

import torch


class Metrics:
    """The cross entropy and the KL of each forward, both reduced as in the loss, without alpha.

    A forward may have several losses, whose mean counts.
    """

    def __init__(self) -> None:
        self._pending: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._count = 0
        self.fired = 0
        """Number of forwards with the KL in their loss."""

    def add(self, ce: torch.Tensor, kl: torch.Tensor) -> None:
        """Add the terms of one loss, 0-dim tensors."""
        self._pending.append(torch.stack([kl.detach().double(), ce.detach().double()]))

    def count_forward(self) -> None:
        """Count a forward whose loss has the KL in it."""
        self.fired += 1

    def end_forward(self) -> None:
        """Add the mean over the losses of a forward to the sums."""
        if not self._pending:
            return
        self._last = torch.stack(self._pending).mean(0)
        self._sum = self._last if self._sum is None else self._sum + self._last
        self._pending = []
        self._count += 1

    def last(self) -> dict[str, Any]:
        """Return the last values, None where there was no loss."""
        self.end_forward()
        kl, ce = [None, None] if self._last is None else self._last.tolist()
        return {"kl": kl, "ce": ce, "rdrop_fired": self.fired}

    def read(self) -> dict[str, Any]:
        """Return the last values and the means since they were last read; None where there was no loss."""
        last = self.last()
        kl, ce = [None, None] if self._sum is None else (self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        return {"kl": last["kl"], "ce": last["ce"], "kl_mean": kl, "ce_mean": ce, "rdrop_fired": self.fired}
