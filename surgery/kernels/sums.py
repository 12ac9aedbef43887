"""The kernels behind inspect and diff: sums over a run of a tensor's elements, or of two tensors' side by side.

Sums are taken in the order of the contract, so that a tensor's standard deviation is the one that scales its noise, to
the bit. NaN and Inf are counted and left out of the sums, as are pairs of which one is not finite.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.dtypes import to_numbers
from surgery.kernels import backends
from surgery.kernels.native import Native, Place
from surgery.noise import BLOCK

_INT: dict[str, type[np.signedinteger[Any]]] = {"F64": np.int64, "F32": np.int32, "F16": np.int16, "BF16": np.int16}
"""Integers that sort as the floats do whose bits they are, but for the sign."""
_LARGEST = {dtype: int(np.iinfo(kind).max) for dtype, kind in _INT.items()}


@dataclass(frozen=True)
class Sums:
    """What `summarize` finds in a run of a tensor's elements.

    Args:
        blocks: as cpu.moments: float64, shape (blocks, 2). What is not finite counts as if it were `shift`.
        low, high: the smallest and the largest finite element; inf and -inf if there is none.
        nan, inf: how many are NaN, and how many are Inf or -Inf.
    """

    blocks: np.ndarray
    low: float
    high: float
    nan: int
    inf: int


@dataclass(frozen=True)
class PairSums:
    """What `compare` finds in a run of two tensors' elements.

    Args:
        blocks: float64, shape (blocks, 4): sums of d^2, a^2 and b^2 and the maximum of |d|, with d = b - a, over the
            pairs that are finite.
        changed: how many pairs differ in their bits.
        broken: how many of those are not finite, on either side.
        skipped: how many pairs are not finite, on either side.
    """

    blocks: np.ndarray
    changed: int
    broken: int
    skipped: int


def summarize(w: np.ndarray, dtype: str, shift: float) -> Sums:
    """Sum up elements that start on a block boundary.

    Args:
        w: flat storage, dtype cpu.STORAGE[dtype].
        dtype: "F64", "F32", "F16" or "BF16".
        shift: the tensor's first element, or any finite number if that is not finite.
    """
    arrays = _room_for_sums(w.size, dtype)
    backends.on_cpu().summarize(w, dtype, shift, *arrays)
    return _sums(*arrays, dtype)


def summarize_file(place: Place, n: int, dtype: str, shift: float) -> Sums | None:
    """Return what `summarize` does, of n elements of a file; None where they cannot be read from here."""
    kernels, arrays = backends.on_cpu(), _room_for_sums(n, dtype)
    is_read = isinstance(kernels, Native) and kernels.summarize_file(place, n, dtype, shift, *arrays)
    return _sums(*arrays, dtype) if is_read else None


def compare(a: np.ndarray, b: np.ndarray, dtype: str) -> PairSums:
    """Compare two runs of elements of one dtype, as `summarize` takes them."""
    arrays = _room_for_pairs(a.size)
    backends.on_cpu().compare(a, b, dtype, *arrays)
    return _pair_sums(*arrays)


def compare_files(a: Place, b: Place, n: int, dtype: str, shift: float) -> tuple[Sums, PairSums] | None:
    """Return what `summarize` of a and `compare` do, of n elements of two files; None as `summarize_file`."""
    kernels, sums, pairs = backends.on_cpu(), _room_for_sums(n, dtype), _room_for_pairs(n)
    is_read = isinstance(kernels, Native) and kernels.compare_files(a, b, n, dtype, shift, sums, pairs)
    return (_sums(*sums, dtype), _pair_sums(*pairs)) if is_read else None


def _room_for_sums(n: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    largest = _LARGEST[dtype]
    return np.empty((-(-n // BLOCK), 2)), np.array([largest, ~largest]), np.zeros(2, np.int64)


def _sums(out: np.ndarray, keys: np.ndarray, counts: np.ndarray, dtype: str) -> Sums:
    low, high = _values(keys.astype(_INT[dtype]), dtype) if keys[0] <= keys[1] else (np.inf, -np.inf)
    return Sums(out, low, high, int(counts[0]), int(counts[1]))


def _room_for_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.empty((-(-n // BLOCK), 4)), np.zeros(3, np.int64)


def _pair_sums(out: np.ndarray, counts: np.ndarray) -> PairSums:
    return PairSums(out, *counts.tolist())


def _values(keys: np.ndarray, dtype: str) -> tuple[float, float]:
    """Return the floats that two keys stand for."""
    bits = np.where(keys < 0, keys ^ _LARGEST[dtype], keys).astype(keys.dtype)
    unsigned = bits.view(np.uint16) if bits.itemsize == 2 else bits.view(f"f{bits.itemsize}")
    low, high = to_numbers(unsigned, dtype)[0].tolist()
    return low + 0.0, high + 0.0  # no -0
