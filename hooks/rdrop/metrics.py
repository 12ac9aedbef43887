"""Means of R-Drop's two terms, kept as tensors on the device: .tolist() would synchronize with it."""

from typing import Any

import torch


class Mean:
    """The two terms of each forward, and their means. A forward may have several losses, whose mean counts."""

    def __init__(self) -> None:
        self._pending: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None
        self._sums: list[torch.Tensor | None] = [None, None]
        self._counts = [0, 0]

    def add(self, terms: torch.Tensor) -> None:
        self._pending.append(terms)

    def end_forward(self) -> None:
        """Add the mean over the losses of a forward to the sums: since they were read, and of all."""
        if not self._pending:
            return
        self._last = torch.stack(self._pending).mean(0)
        self._sums = [self._last if total is None else total + self._last for total in self._sums]
        self._counts = [count + 1 for count in self._counts]
        self._pending = []

    def last(self) -> list[float | None]:
        return [None, None] if self._last is None else self._last.tolist()

    def of_all(self) -> list[float | None]:
        """Return the means over all forwards."""
        return self._mean(1)

    def read(self) -> list[float | None]:
        """Return the means over the forwards since they were last read."""
        means = self._mean(0)
        self._sums[0], self._counts[0] = None, 0
        return means

    def _mean(self, which: int) -> list[float | None]:
        total = self._sums[which]
        return [None, None] if total is None else (total / self._counts[which]).tolist()


_TERMS = {False: ("kl", "ce"), True: ("pair_mse", "mse")}
"""What the terms are called: the symmetric KL and the cross-entropy, or for mse_loss the two mean squared errors."""


class Metrics:
    """The consistency term and the loss itself of each forward, both reduced as in the loss, without alpha."""

    def __init__(self) -> None:
        self._means = {False: Mean()}
        self.fired = 0
        """Number of forwards with the consistency term in their loss."""

    def add(self, loss: torch.Tensor, consistency: torch.Tensor, *, is_mse: bool = False) -> None:
        """Add the terms of one loss, 0-dim tensors."""
        terms = torch.stack([consistency.detach().double(), loss.detach().double()])
        self._means.setdefault(is_mse, Mean()).add(terms)

    def count_forward(self) -> None:
        """Count a forward whose loss has the consistency term in it."""
        self.fired += 1

    def end_forward(self) -> None:
        """Take in the losses of a forward that is over."""
        for mean in self._means.values():
            mean.end_forward()

    def read(self) -> dict[str, Any]:
        """Return the last values and the means since they were last read; None where there was no loss."""
        self.end_forward()
        last: dict[str, Any] = {}
        means: dict[str, Any] = {}
        for is_mse, mean in self._means.items():
            last |= dict(zip(_TERMS[is_mse], mean.last(), strict=True))
            means |= dict(zip((f"{name}_mean" for name in _TERMS[is_mse]), mean.read(), strict=True))
        return last | means | {"rdrop_fired": self.fired}

    def report(self) -> dict[str, Any]:
        """Return the last values and the means over all forwards; reading them changes nothing."""
        self.end_forward()
        found: dict[str, Any] = {}
        for is_mse, mean in self._means.items():
            found |= dict(zip(_TERMS[is_mse], mean.last(), strict=True))
            found |= dict(zip((f"{name}_mean" for name in _TERMS[is_mse]), mean.of_all(), strict=True))
        return found
