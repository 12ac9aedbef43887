"""Tensors that ranks hold in boxes: whether the boxes cover a tensor, and any run of its bytes, copied from them.

A box is an offset in each dimension, and an array of that part of the tensor. The arrays may be mapped files: what is
not asked for is not read.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

Box = tuple[Sequence[int], np.ndarray]
"""Where it begins, and its elements."""

_MOST_CELLS = 1 << 24  # that boxes may cut a tensor into: ranks cut a grid


def cover_fault(shape: Sequence[int], boxes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """Say why boxes, given by offsets and sizes, are not the whole of a tensor, each element once; None if they are."""
    boxes = [(tuple(begin), tuple(b + n for b, n in zip(begin, size, strict=True))) for begin, size in boxes]
    for begin, end in boxes:
        if len(begin) != len(shape) or not all(0 <= b <= e <= n for b, e, n in zip(begin, end, shape, strict=True)):
            return f"one from {list(begin)} to {list(end)}"
    lines = [np.unique([edge[i] for box in boxes for edge in box] + [0, n]) for i, n in enumerate(shape)]
    if math.prod(len(line) for line in lines) > _MOST_CELLS:
        return f"{len(boxes)} that are no grid"
    marks = np.zeros([len(line) - 1 for line in lines], bool)
    for begin, end in boxes:
        cells = tuple(slice(*np.searchsorted(line, (b, e))) for line, b, e in zip(lines, begin, end, strict=True))
        if marks[cells].any():
            return f"two that hold element {list(begin)}"
        marks[cells] = True
    return None if marks.all() else f"none of element {_first_gap(marks, lines)}"


def _first_gap(marks: np.ndarray, lines: Sequence[np.ndarray]) -> list[int]:
    cell = np.argwhere(~marks)[0]
    return [int(line[i]) for line, i in zip(lines, cell, strict=True)]


def copy_bytes(boxes: Sequence[Box], shape: Sequence[int], start: int, buffer: memoryview) -> None:
    """Fill `buffer` with a tensor's bytes from `start` on, as they would lie in one contiguous array.

    Args:
        boxes: that cover the tensor, of one dtype.
        shape: of the tensor.
    """
    dtype = boxes[0][1].dtype
    boxes = [(offset or (0,), np.atleast_1d(data)) for offset, data in boxes]
    first, skipped = divmod(start, dtype.itemsize)
    elements = np.frombuffer(buffer, np.uint8)
    if skipped or len(buffer) % dtype.itemsize:  # an element is cut
        whole = np.empty(-(-(skipped + len(buffer)) // dtype.itemsize), dtype)
        _copy(boxes, shape or (1,), first, whole)
        elements[:] = whole.view(np.uint8)[skipped : skipped + len(buffer)]
    else:
        _copy(boxes, shape or (1,), first, elements.view(dtype))


def _copy(boxes: Sequence[Box], shape: Sequence[int], start: int, out: np.ndarray) -> None:
    """Copy a run of elements: the end of one row, whole rows at once, the beginning of another."""
    row = math.prod(shape[1:])
    if not len(out):
        return
    first, inside = divmod(start, row)
    n = min(row - inside, len(out))
    if n == row:
        n = len(out) // row * row
        _copy_rows(boxes, first, out[:n].reshape(-1, *shape[1:]))
    else:
        cut = [(offset[1:], data[first - offset[0]]) for offset, data in boxes if 0 <= first - offset[0] < len(data)]
        _copy(cut, shape[1:], inside, out[:n])
    _copy(boxes, shape, start + n, out[n:])


def _copy_rows(boxes: Sequence[Box], first: int, out: np.ndarray) -> None:
    for offset, data in boxes:
        low, high = max(first, offset[0]), min(first + len(out), offset[0] + len(data))
        if low < high:
            inner = tuple(slice(begin, begin + n) for begin, n in zip(offset[1:], data.shape[1:], strict=True))
            out[(slice(low - first, high - first), *inner)] = data[low - offset[0] : high - offset[0]]
