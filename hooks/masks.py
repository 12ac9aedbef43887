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
class Draw:
    """A mask that is made from its seed whenever it is needed, so that nothing of a weight's size is kept."""

    seed: int
    shape: tuple[int, ...]
    repeats: int
    share: float

    def mask(self, like: torch.Tensor) -> torch.Tensor:
        """Return the 0/1 mask, in the dtype that `mix` takes for `like`, on its device."""
        if like.device.type == "cpu":
            mask = _numpy_mask(self.seed, self.shape, self.share).to(_mask_dtype(like))
        else:
            generator = torch.Generator(like.device).manual_seed(self.seed)
            empty = torch.empty(self.shape, dtype=_mask_dtype(like), device=like.device)
            mask = empty.bernoulli_(self.share, generator=generator)
        return mask.repeat_interleave(self.repeats, 0) if self.repeats > 1 else mask


def draw_mask(shape: tuple[int, ...], repeats: int, share: float, like: torch.Tensor) -> torch.Tensor:
    """Draw a 0/1 mask from the global generator of the device of `like`.

    Args:
        shape: broadcasts over `like` once each row stands `repeats` times.
        share: probability of a 1, that is 1 - p.
    """
    mask = torch.empty(shape, dtype=_mask_dtype(like), device=like.device).bernoulli_(share)
    return mask.repeat_interleave(repeats, 0) if repeats > 1 else mask


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


def _mask_dtype(like: torch.Tensor) -> torch.dtype:
    """0.0 and 1.0 where 1 / (1 - p) is exact enough in the weight's dtype to be multiplied in, else bools."""
    return like.dtype if like.dtype in (torch.float32, torch.float64) else torch.bool
