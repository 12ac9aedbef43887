"""Which tensors share elements of one storage: columns of one matrix lie between each other without sharing any."""

from collections.abc import Mapping

import numpy as np
import torch

_MOST = 1 << 28  # elements of a storage that are marked one by one, a byte each


def overlap(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
    """Return the names of two tensors of one storage that share elements, the earlier first; None if none do."""
    spans = {name: _span(tensor) for name, tensor in tensors.items()}
    reached = -1
    for begin, end in sorted(spans.values()):
        if begin < reached:
            return _shared(tensors, spans)
        reached = end
    return None


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the bytes from a tensor's first element to the end of its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _shared(tensors: Mapping[str, torch.Tensor], spans: Mapping[str, tuple[int, int]]) -> tuple[str, str] | None:
    """Mark the elements of each tensor, until one of them is marked already."""
    begin, end = min(begin for begin, _ in spans.values()), max(end for _, end in spans.values())
    widths = {tensor.element_size() for tensor in tensors.values()}
    width = widths.pop()
    is_regular = not widths and all((start - begin) % width == 0 for start, _ in spans.values())
    if not is_regular or (end - begin) // width > _MOST:
        return _first_pair(spans)
    marks = np.zeros((end - begin) // width, bool)
    for name, tensor in tensors.items():
        mine = _view(marks, tensor, (spans[name][0] - begin) // width)
        if mine.any():
            return _culprit(tensors, spans, name, marks, begin), name
        mine[...] = True
    return None


def _view(marks: np.ndarray, tensor: torch.Tensor, offset: int) -> np.ndarray:
    """Look at one tensor's elements; what it repeats is looked at once."""
    shape = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return np.lib.stride_tricks.as_strided(marks[offset:], shape, tensor.stride(), writeable=True)


def _culprit(
    tensors: Mapping[str, torch.Tensor],
    spans: Mapping[str, tuple[int, int]],
    name: str,
    marks: np.ndarray,
    begin: int,
) -> str:
    """Return the name of the first tensor that shares elements with this one."""
    width = tensors[name].element_size()
    marks[:] = False
    _view(marks, tensors[name], (spans[name][0] - begin) // width)[...] = True
    views = ((other, _view(marks, tensor, (spans[other][0] - begin) // width)) for other, tensor in tensors.items())
    return next(other for other, view in views if view.any())


def _first_pair(spans: Mapping[str, tuple[int, int]]) -> tuple[str, str]:
    """Return two whose spans meet, where it is not told whether their elements do."""
    names = list(spans)
    pairs = ((a, b) for i, b in enumerate(names) for a in names[:i])
    return next((a, b) for a, b in pairs if spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1])
