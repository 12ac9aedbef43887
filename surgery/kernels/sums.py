"""The kernels of `stats` called on NumPy arrays: summarize(a) and compare(a, b), over runs of a tensor's elements."""

from dataclasses import dataclass

import numpy as np

from surgery.dtypes import CODES, to_numbers
from surgery.kernels.native import Native
from surgery.noise import BLOCK, LANES

_SIGNED = {"F64": np.int64, "F32": np.int32, "F16": np.int16, "BF16": np.int16}
_INF = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of Inf: those of finite values are smaller, those of NaN greater."""
_ENTRIES = {
    (name, bits): Native(name, tuple(types.format(bits=bits, wide=max(bits, 32)).split()))
    for name, types in {
        "summarize": "int{bits}* int64 int64 int64 int64 float64 float{wide}* float64* float64* int{bits}* int64*",
        "compare": "int{bits}* int{bits}* int64 int64 int64 int64 float{wide}* float{wide}* float64* float64* int64*",
    }.items()
    for bits in (16, 32, 64)
}


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
    bits = w.view(_SIGNED[dtype])
    mask = int(np.iinfo(bits.dtype).max)
    out = np.empty((-(-w.size // BLOCK), 2))
    keys = np.array([mask, ~mask], bits.dtype)
    counts = np.zeros(2, np.int64)
    entry = _ENTRIES["summarize", 8 * bits.itemsize]
    entry(bits, w.size, CODES[dtype], mask, _INF[dtype], float(shift), _block(dtype), _rows(), out, keys, counts)
    low, high = _values(keys, dtype) if keys[0] <= keys[1] else (np.inf, -np.inf)
    return Sums(out, low, high, int(counts[0]), int(counts[1]))


def compare(a: np.ndarray, b: np.ndarray, dtype: str) -> PairSums:
    """Compare two runs of elements of one dtype, as `summarize` takes them."""
    bits, others = a.view(_SIGNED[dtype]), b.view(_SIGNED[dtype])
    mask = int(np.iinfo(bits.dtype).max)
    out = np.empty((-(-a.size // BLOCK), 4))
    counts = np.zeros(3, np.int64)
    entry = _ENTRIES["compare", 8 * bits.itemsize]
    entry(bits, others, a.size, CODES[dtype], mask, _INF[dtype], _block(dtype), _block(dtype), _rows(), out, counts)
    return PairSums(out, *(int(count) for count in counts))


def _block(dtype: str) -> np.ndarray:
    """Make room for the values of a block."""
    return np.empty(BLOCK, np.float64 if dtype == "F64" else np.float32)


def _rows() -> np.ndarray:
    """Make room for the sums of a block's columns."""
    return np.empty((2, LANES))


def _values(keys: np.ndarray, dtype: str) -> tuple[float, float]:
    """Return the floats that two keys stand for."""
    bits = np.where(keys < 0, keys ^ np.iinfo(keys.dtype).max, keys).astype(keys.dtype)
    unsigned = bits.view(np.uint16) if bits.itemsize == 2 else bits.view(f"f{bits.itemsize}")
    low, high = to_numbers(unsigned, dtype)[0].tolist()
    return low + 0.0, high + 0.0  # no -0
