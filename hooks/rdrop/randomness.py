"""Whether the two passes of R-Drop differ at all."""

import torch

from surgery.errors import SourceError

_PATIENCE = 10
"""Optimizer steps in which random numbers may be drawn and not show: w is still w_pre, or a zero layer hides them."""


class Randomness:
    """Looks at the logits until two have differed; that costs a wait for the device."""

    def __init__(self) -> None:
        self._is_seen = False
        self._since: int | None = None
        self._states: list[torch.Tensor] = []

    def mark(self) -> None:
        """Remember how far the random generators are, before the first pass."""
        if not self._is_seen:
            self._states = _states()

    def check(self, a: torch.Tensor, b: torch.Tensor, *, steps: int) -> None:
        """Raise if there is no randomness between the passes.

        Args:
            a, b: the logits.
            steps: the optimizer's, so far.
        Raises:
            SourceError: they are equal to the bit, and no random number was drawn, or none has shown for long.
        """
        if self._is_seen:
            return
        if a.shape != b.shape or not torch.equal(a, b):
            self._is_seen = True
            self._states = []
            return
        self._since = steps if self._since is None else self._since
        is_drawn = any(not torch.equal(was, now) for was, now in zip(self._states, _states(), strict=True))
        if not is_drawn or steps - self._since >= _PATIENCE:
            raise SourceError(
                "rdrop: expected two passes that differ, got logits that are equal to the bit: no dropout is at work. "
                "Give the model dropout (LoRA's will do) or Mixout, or train without rdrop."
            )


def _states() -> list[torch.Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]
