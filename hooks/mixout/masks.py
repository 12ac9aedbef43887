"""Draw a weight's mask, the m ~ Bernoulli(1 - p) of Mixout, from torch's global generators.

The global generators are what gradient checkpointing restores before it runs a layer again, so the recomputed forward
sees the masks of the first one; a generator of our own would silently draw others.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

_REMEMBERED = 4096
"""Draws of a tied weight that may still be recomputed: its uses in all forward passes that wait for their backward."""


@dataclass(frozen=True)
class Chance:
    """The odds of a mask.

    Args:
        p: probability in [0, 1] of a 0, that is of w_pre.
    """

    p: float

    @property
    def share(self) -> float:
        """The probability of a 1."""
        return 1 - self.p

    @property
    def scale(self) -> float:
        """1 / (1 - p), which keeps the mean; 0 for p = 1, where no 1 is ever drawn."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0


@dataclass(frozen=True)
class Draw:
    """A mask that is made from its seed whenever it is needed, so that nothing of a weight's size is kept.

    Args:
        shape: broadcasts over the weight once each row stands `repeats` times.
    """

    seed: int
    shape: tuple[int, ...]
    repeats: int
    chance: Chance

    def mask(self, like: torch.Tensor) -> torch.Tensor:
        """Return the mask on the device of `like`, as draw_mask does."""
        if like.device.type == "cpu":
            return _finish(
                _numpy_mask(self.seed, self.shape, self.chance.share).to(_dtype(like)), self.repeats, self.chance
            )
        generator = torch.Generator(like.device).manual_seed(self.seed)
        empty = torch.empty(self.shape, dtype=_dtype(like), device=like.device)
        return _finish(empty.bernoulli_(self.chance.share, generator=generator), self.repeats, self.chance)


def draw_mask(shape: tuple[int, ...], repeats: int, chance: Chance, like: torch.Tensor) -> torch.Tensor:
    """Draw a mask from the global generator of the device of `like`.

    Args:
        shape: broadcasts over `like` once each row stands `repeats` times.
    Returns:
        m / (1 - p) in the dtype of `like` if that is float32 or float64, else m as bools: 1 / (1 - p) would be rounded.
    """
    empty = torch.empty(shape, dtype=_dtype(like), device=like.device)
    return _finish(empty.bernoulli_(chance.share), repeats, chance)


def _dtype(like: torch.Tensor) -> torch.dtype:
    return like.dtype if like.dtype in (torch.float32, torch.float64) else torch.bool


def _finish(mask: torch.Tensor, repeats: int, chance: Chance) -> torch.Tensor:
    scaled = mask if mask.dtype == torch.bool else mask.mul_(chance.scale)
    return scaled.repeat_interleave(repeats, 0) if repeats > 1 else scaled


class SharedSeeds:
    """One seed for all uses of a tied weight in one forward pass of the model, also when a use is recomputed.

    Every use draws a number, so that a recomputed region consumes what the first run of it did; the number of a later
    use stands for the seed of the first one.
    """

    def __init__(self) -> None:
        self._seeds: OrderedDict[int, int] = OrderedDict()
        self._first: int | None = None

    def begin(self) -> None:
        """Start or end a forward pass: what was drawn before is not shared any more."""
        self._first = None

    @property
    def is_drawn(self) -> bool:
        """This forward pass has a seed."""
        return self._first is not None

    def seed(self, *, is_in_pass: bool) -> int:
        drawn = draw_seed()
        if not is_in_pass:  # recomputed for the backward pass, or a layer called on its own
            return self._seeds.get(drawn, drawn)
        if self._first is None:
            self._first = drawn
        self._seeds[drawn] = self._first  # a user who seeds again meets the same numbers in another order
        if len(self._seeds) > _REMEMBERED:
            self._seeds.popitem(last=False)
        return self._first


def draw_seed() -> int:
    """Draw from the CPU's global generator, whatever the device: reading it back costs no synchronization."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def _numpy_mask(seed: int, shape: tuple[int, ...], share: float) -> torch.Tensor:
    # 1 ns per element on one core; torch's own bernoulli_ takes 9
    size = math.prod(shape)
    bits = np.random.SFC64(seed).random_raw((size + 1) // 2).view(np.uint32)[:size]
    return torch.from_numpy(bits < np.uint32(min(round(share * 2**32), 2**32 - 1))).view(shape)
