"""What a tensor holds, and how two of them differ: numba kernels over raw storage, a block of the contract at a time.

The sums of one tensor are the noise contract's, so that its standard deviation is the one that scales its noise, to the
bit. NaN and Inf are counted and left out of the sums, as are pairs of which one is not finite. Minimum and maximum are
those of the bits as sorted integers: that vectorizes, and it tells which blocks are finite.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.dtypes import to_numbers
from surgery.kernels.cpu import STORAGE, block_moments, fold
from surgery.kernels.halves import widen
from surgery.kernels.jit import kernel
from surgery.noise import BLOCK, LANES

_SIGNED = {"F64": np.int64, "F32": np.int32, "F16": np.int16, "BF16": np.int16}
_INF = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of Inf: those of finite values are smaller, those of NaN greater."""
_WHOLE, _F16, _BF16 = 0, 1, 2
_CODES = {"F64": _WHOLE, "F32": _WHOLE, "F16": _F16, "BF16": _BF16}
"""How the kernels get from bits to values."""


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
class Differences:
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


@kernel
def _load(bits, dtype, x):
    """Write the values of a block to x."""
    if dtype == _WHOLE:
        values = x.view(bits.dtype)
        for i in range(bits.size):
            values[i] = bits[i]
    else:
        widen(bits.view(np.uint16), x.view(np.uint32), dtype == _BF16)


@kernel
def _extremes(bits, mask, lowest):
    """Return the lowest and the highest of a block's bits, as integers that sort as the floats do."""
    low, high = mask, lowest
    for i in range(bits.size):
        v = bits[i]
        k = bits.dtype.type(v ^ mask) if v < 0 else v
        low = min(low, k)
        high = max(high, k)
    return low, high


@kernel
def _mend(bits, mask, lowest, inf, shift, x, counts):
    """Return the same of the finite elements; count the others, and set them to `shift` in x."""
    low, high = mask, lowest
    for i in range(bits.size):
        v = bits[i]
        magnitude = v & mask
        if magnitude < inf:
            k = bits.dtype.type(v ^ mask) if v < 0 else v
            low = min(low, k)
            high = max(high, k)
        else:
            x[i] = shift
            counts[0] += magnitude > inf
            counts[1] += magnitude == inf
    return low, high


@kernel
def _summarize(bits, dtype, x, mask, lowest, inf, shift, out, keys, counts):
    s1, s2 = np.empty(LANES), np.empty(LANES)
    for b in range(out.shape[0]):
        block = bits[b * BLOCK : (b + 1) * BLOCK]
        _load(block, dtype, x)
        x[block.size :] = shift
        low, high = _extremes(block, mask, lowest)
        if high >= inf or low < -inf:
            low, high = _mend(block, mask, lowest, inf, shift, x, counts)
        keys[0] = min(keys[0], low)
        keys[1] = max(keys[1], high)
        block_moments(x, shift, s1, s2, out[b])


@kernel
def _count_changed(a, b):
    changed = 0
    for i in range(a.size):
        changed += a[i] != b[i]
    return changed


@kernel
def _largest(a, b, mask):
    """Return the largest magnitude of two blocks, as bits."""
    largest = a.dtype.type(0)
    for i in range(a.size):
        largest = max(largest, a.dtype.type(max(a[i] & mask, b[i] & mask)))
    return largest


@kernel
def _skip(a, b, mask, inf, x, y, counts):
    """Count the pairs of which one is not finite, and set them to 0 in x and y."""
    for i in range(a.size):
        if (a[i] & mask) >= inf or (b[i] & mask) >= inf:
            x[i] = y[i] = 0
            counts[1] += a[i] != b[i]
            counts[2] += 1


@kernel
def _sum_squares(x, s):
    for i in range(LANES):
        a, b = np.float64(x[i]), np.float64(x[LANES + i])
        c, d = np.float64(x[2 * LANES + i]), np.float64(x[3 * LANES + i])
        s[i] = (a * a + b * b) + (c * c + d * d)
    return fold(s)


@kernel
def _more(a, b):
    """Return the greater of two numbers. Unlike max it vectorizes, since it says nothing of NaN."""
    return a if a > b else b


@kernel
def _sum_changes(x, y, s, most):
    for i in range(LANES):
        a, b = np.float64(y[i]) - np.float64(x[i]), np.float64(y[LANES + i]) - np.float64(x[LANES + i])
        c = np.float64(y[2 * LANES + i]) - np.float64(x[2 * LANES + i])
        d = np.float64(y[3 * LANES + i]) - np.float64(x[3 * LANES + i])
        s[i] = (a * a + b * b) + (c * c + d * d)
        most[i] = _more(_more(abs(a), abs(b)), _more(abs(c), abs(d)))
    return fold(s)


@kernel
def _largest_of(most):
    h = LANES // 2
    while h > 0:
        for i in range(h):
            most[i] = _more(most[i], most[h + i])
        h //= 2
    return most[0]


@kernel
def _compare(a, b, dtype, x, y, mask, inf, out, counts):
    s, most = np.empty(LANES), np.empty(LANES)
    for k in range(out.shape[0]):
        one, other = a[k * BLOCK : (k + 1) * BLOCK], b[k * BLOCK : (k + 1) * BLOCK]
        _load(one, dtype, x)
        _load(other, dtype, y)
        x[one.size :] = y[one.size :] = 0
        changed = _count_changed(one, other)
        counts[0] += changed
        if _largest(one, other, mask) >= inf:
            _skip(one, other, mask, inf, x, y, counts)
        out[k, 1] = out[k, 2] = _sum_squares(x, s)
        out[k, 0] = out[k, 3] = 0.0
        if changed:
            out[k, 0] = _sum_changes(x, y, s, most)
            out[k, 2] = _sum_squares(y, s)
            out[k, 3] = _largest_of(most)


def summarize(w: np.ndarray, dtype: str, shift: float) -> Sums:
    """Sum up elements that start on a block boundary.

    Args:
        w: flat storage, dtype cpu.STORAGE[dtype].
        dtype: "F64", "F32", "F16" or "BF16".
        shift: the tensor's first element, or any finite number if that is not finite.
    """
    bits, x, mask, inf = _prepare(w, dtype)
    out = np.empty((-(-w.size // BLOCK), 2))
    keys = np.array([mask, ~mask])
    counts = np.zeros(2, np.int64)
    _summarize(bits, _CODES[dtype], x, mask, ~mask, inf, np.float64(shift), out, keys, counts)
    low, high = _values(keys, dtype) if keys[0] <= keys[1] else (np.inf, -np.inf)
    return Sums(out, low, high, int(counts[0]), int(counts[1]))


def compare(a: np.ndarray, b: np.ndarray, dtype: str) -> Differences:
    """Compare two runs of elements of one dtype, as `summarize` takes them."""
    bits, x, mask, inf = _prepare(a, dtype)
    out = np.empty((-(-a.size // BLOCK), 4))
    counts = np.zeros(3, np.int64)
    _compare(bits, b.view(bits.dtype), _CODES[dtype], x, np.empty_like(x), mask, inf, out, counts)
    return Differences(out, *(int(count) for count in counts))


def _prepare(w: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """Return w's bits, room for the values of a block, and the bits of the largest magnitude and of Inf."""
    signed: Any = _SIGNED[dtype]
    x = np.empty(BLOCK, np.float64 if dtype == "F64" else np.float32)
    return w.view(signed), x, signed(np.iinfo(signed).max), signed(_INF[dtype])


def _values(keys: np.ndarray, dtype: str) -> tuple[float, float]:
    """Return the floats that two keys stand for."""
    bits = np.where(keys < 0, keys ^ np.iinfo(keys.dtype).max, keys).astype(keys.dtype)
    low, high = to_numbers(bits.view(STORAGE[dtype]), dtype)[0].tolist()
    return low + 0.0, high + 0.0  # no -0
