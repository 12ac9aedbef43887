"""Refuse R-Drop where torch.equal finds both passes' logits the same to the bit: no dropout, and a KL of 0."""

import random
import sys
from typing import Any

import torch

from surgery.errors import SourceError

_MAX_EQUAL_STEPS = 10
"""Optimizer steps in which random numbers may be drawn without effect: w is still w_pre, or a zero layer hides them."""


class Randomness:
    """Compares the logits until two have differed, and then no more: a comparison synchronizes with the device."""

    def __init__(self) -> None:
        self.has_differed = False
        """Two passes have not been equal, so that R-Drop has had an effect."""
        self._equal_since: int | None = None
        self._rng_states: list[torch.Tensor] = []

    def save_rng_states(self) -> None:
        """Save the states of the random number generators, before the first pass."""
        if not self.has_differed:
            self._rng_states = _rng_states()

    def check_passes_differ(self, a: torch.Tensor, b: torch.Tensor, *, steps: int) -> None:
        """Raise if the passes are equal and will stay so.

        Args:
            a, b: the logits.
            steps: optimizer steps so far.
        Raises:
            SourceError: they are equal to the bit, and no random number was drawn, or none had an effect for long.
        """
        if self.has_differed:
            return
        if a.shape != b.shape or not torch.equal(a, b):
            self.has_differed = True
            self._rng_states = []
            return
        self._equal_since = steps if self._equal_since is None else self._equal_since
        is_drawn = any(not torch.equal(was, now) for was, now in zip(self._rng_states, _rng_states(), strict=True))
        if not is_drawn or steps - self._equal_since >= _MAX_EQUAL_STEPS:
            raise SourceError(
                "rdrop: expected two passes that differ, got logits that are equal to the bit: no dropout is at work. "
                "Give the model dropout, or Mixout beside it, or train without rdrop."
            )


def _rng_states() -> list[torch.Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


HostStates = tuple[Any, ...]
"""Of Python's generator, and of NumPy's if it is there."""


def save_host_states() -> HostStates:
    """Return the states of the generators that models choose with what to do: layers, masked spans."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy and numpy.random.get_state()


def restore_host_states(states: HostStates) -> None:
    """Have the second pass choose as the first one: the two are to differ in their dropout alone."""
    own, of_numpy = states
    random.setstate(own)
    if of_numpy:
        sys.modules["numpy"].random.set_state(of_numpy)
