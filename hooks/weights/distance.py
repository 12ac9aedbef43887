"""Sums of squares of a - b, in float64, in pieces whose float64 copies stay in the processor's cache."""

from collections.abc import Iterable, Iterator

import torch

_ON_CPU = 1 << 16
_ON_GPU = 1 << 22
"""Elements of a piece: a GPU's cost starting kernels, whatever their size."""


def squares_of_difference(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield sums of (a - b)^2 over pieces of two tensors of one device."""
    size = _ON_CPU if a.device.type == "cpu" else _ON_GPU
    for part, other in zip(*(torch.split(one.flatten(), size) for one in (a, b)), strict=True):
        difference = part.to(torch.float64, copy=True).sub_(other)
        yield torch.dot(difference, difference)


def total(sums: Iterable[torch.Tensor]) -> float:
    """Add up scalars of several devices, with one wait for each device."""
    of_device: dict[torch.device, list[torch.Tensor]] = {}
    for one in sums:
        of_device.setdefault(one.device, []).append(one)
    return sum(float(torch.stack(together).sum()) for together in of_device.values())
