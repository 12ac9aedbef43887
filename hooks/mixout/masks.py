"""Draw a weight's mask, the m ~ Bernoulli(1 - p) of Mixout, from torch's global generators.

The global generators are what gradient checkpointing restores before it runs a layer again, so the recomputed forward
sees the masks of the first one; a generator of our own would silently draw others.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from surgery.kernels import masks
from surgery.kernels.tensors import as_array

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
            mask = masks.draw_mask(self.seed, self.chance.share, math.prod(self.shape)).reshape(self.shape)
            return _finish(torch.from_numpy(mask).to(_dtype(like)), self.repeats, self.chance)
        generator = torch.Generator(like.device).manual_seed(self.seed)
        empty = torch.empty(self.shape, dtype=_dtype(like), device=like.device)
        return _finish(empty.bernoulli_(self.chance.share, generator=generator), self.repeats, self.chance)

    def is_fused(self, *tensors: torch.Tensor) -> bool:
        """Tell whether the kernels take these, and so make the mask while they use it."""
        return all(
            tensor.shape == self.shape
            and tensor.device.type == "cpu"
            and tensor.dtype in (torch.float32, torch.float64)
            and type(tensor) in (torch.Tensor, torch.nn.Parameter)
            for tensor in tensors
        )

    def mix(self, w: torch.Tensor, w_pre: torch.Tensor) -> torch.Tensor:
        """Return w_pre + (w - w_pre) * m / (1 - p)."""
        out = torch.empty(w.shape, dtype=w.dtype)
        masks.mix(_array(w), _array(w_pre), **self._mask(self.chance.scale), out=as_array(out))
        return out

    def gate(self, grad: torch.Tensor, scale: float) -> torch.Tensor:
        """Return grad * m * scale."""
        out = torch.empty(grad.shape, dtype=grad.dtype)
        masks.gate(_array(grad), **self._mask(scale), out=as_array(out))
        return out

    def _mask(self, scale: float) -> dict[str, Any]:
        return {"seed": self.seed, "share": self.chance.share, "scale": scale}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return as_array(tensor.detach().contiguous())


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
