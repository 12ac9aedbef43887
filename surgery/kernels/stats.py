"""numba kernels behind `surgery inspect --stats` and `diff`: sums, extremes, NaN and Inf of a block, or of two.

The sums of one tensor are the noise contract's, so that its standard deviation is the one that scales its noise, to the
bit. NaN and Inf are counted and left out of the sums, as are pairs of which one is not finite. Minimum and maximum are
those of the bits as sorted integers: that vectorizes, and it tells which blocks are finite.

The two entries, `summarize` and `compare`, take pointers, for `native`; `sums` calls them.
"""

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from surgery.dtypes import BF16, WHOLE
from surgery.kernels.cpu import block_moments, fold
from surgery.kernels.halves import widen
from surgery.kernels.jit import kernel
from surgery.noise import BLOCK, LANES


@kernel
def _load(bits, dtype, x):
    """Write the values of a block to x."""
    if dtype == WHOLE:
        values = x.view(bits.dtype)
        for i in range(bits.size):
            values[i] = bits[i]
    else:
        widen(bits.view(np.uint16), x.view(np.uint32), dtype == BF16)


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
def _summarize(bits, dtype, x, mask, lowest, inf, shift, s1, s2, out, keys, counts):
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
def _compare(a, b, dtype, x, y, mask, inf, s, most, out, counts):
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


def summarize(bits, n, dtype, mask, inf, shift, x, scratch, out, keys, counts):
    """Enter `_summarize` with n elements, room for a block and for two rows of sums, and the results of sums.Sums."""
    w, room = carray(bits, n), carray(scratch, (2, LANES))
    of_type = w.dtype.type
    _summarize(
        w, dtype, carray(x, BLOCK), of_type(mask), of_type(~mask), of_type(inf), shift, room[0], room[1],
        carray(out, ((n + BLOCK - 1) // BLOCK, 2)), carray(keys, 2), carray(counts, 2),
    )  # fmt: skip


def compare(a, b, n, dtype, mask, inf, x, y, scratch, out, counts):
    """Enter `_compare` in the same way, with room for two blocks, and the results of sums.PairSums."""
    w, room = carray(a, n), carray(scratch, (2, LANES))
    of_type = w.dtype.type
    _compare(
        w, carray(b, n), dtype, carray(x, BLOCK), carray(y, BLOCK), of_type(mask), of_type(inf), room[0], room[1],
        carray(out, ((n + BLOCK - 1) // BLOCK, 4)), carray(counts, 3),
    )  # fmt: skip
