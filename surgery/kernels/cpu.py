"""numba kernels that measure and perturb raw tensor storage in place, a block of 4096 elements at a time.

float16 and bfloat16 travel as uint16 arrays; float32 and float64 as themselves. No kernel here is compiled with
fastmath: reassociation or fusing would change the bits. Inner loops are short and plain, so that they vectorize.
"""

import numpy as np

from surgery.kernels.halves import narrow, narrow_stochastic, widen
from surgery.kernels.jit import kernel
from surgery.kernels.philox import normal, philox_block, to_uniform
from surgery.noise import BLOCK, LANES, NOISE_STREAM, ROUNDING_STREAM, SAMPLED_BLOCKS, SECOND_STREAM

STORAGE = {"F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
"""Floating-point dtypes, in safetensors' names, and the numpy dtype in which their kernels take them."""

_SUM_LANES = 128


@kernel
def fold(t):
    """Sum 1024 lanes by halves: a fixed order that vectorizes."""
    h = LANES // 2
    while h > 0:
        for i in range(h):
            t[i] += t[h + i]
        h //= 2
    return t[0]


@kernel
def block_moments(x, shift, s1, s2, out):
    """Sum d = x - shift and d * d over one block in the contract's order. x: 4096 values, the first n valid."""
    for i in range(LANES):
        d0 = np.float64(x[i]) - shift
        d1 = np.float64(x[LANES + i]) - shift
        d2 = np.float64(x[2 * LANES + i]) - shift
        d3 = np.float64(x[3 * LANES + i]) - shift
        s1[i] = (d0 + d1) + (d2 + d3)
        s2[i] = (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    out[0] = fold(s1)
    out[1] = fold(s2)


@kernel
def _moments(w, shift, out):
    x = np.empty(BLOCK, w.dtype)
    s1, s2 = np.empty(LANES), np.empty(LANES)
    for b in range(out.shape[0]):
        block = w[b * BLOCK : (b + 1) * BLOCK]
        if block.size < BLOCK:
            x[: block.size] = block
            x[block.size :] = shift
            block = x
        block_moments(block, shift, s1, s2, out[b])


@kernel
def _moments_half(w, is_bfloat, shift, out):
    x = np.empty(BLOCK, np.float32)
    s1, s2 = np.empty(LANES), np.empty(LANES)
    for b in range(out.shape[0]):
        block = w[b * BLOCK : (b + 1) * BLOCK]
        widen(block, x.view(np.uint32), is_bfloat)
        x[block.size :] = shift
        block_moments(x, shift, s1, s2, out[b])


@kernel
def _measure(old, new, u, scale, lanes, out):
    """Sum (change * noise, noise^2, change^2) over the first row of a block."""
    lanes[:] = 0.0
    a, b, c = lanes[0], lanes[1], lanes[2]
    for j in range(0, old.size, _SUM_LANES):
        for i in range(min(_SUM_LANES, old.size - j)):
            change, noise = np.float64(new[j + i] - old[j + i]), np.float64(u[j + i] * scale)
            a[i] += change * noise
            b[i] += noise * noise
            c[i] += change * change
    out[0] = np.sum(a)
    out[1] = np.sum(b)
    out[2] = np.sum(c)


@kernel
def _draw_block(block, is_normal, is_stochastic, k0, k1, words):
    """Write the words that one block needs: a row of `words` for each stream."""
    philox_block(block, NOISE_STREAM, k0, k1, words[0])
    if is_normal:
        philox_block(block, SECOND_STREAM, k0, k1, words[1])
    if is_stochastic:
        philox_block(block, ROUNDING_STREAM, k0, k1, words[2])


@kernel
def _add(before, words, more_words, is_normal, scale, u, after):
    """Write before + u * scale of one row, and for normal noise u too."""
    if is_normal:
        normal(words, more_words, u)
        for i in range(before.size):
            after[i] = before[i] + u[i] * scale
    else:
        for i in range(before.size):
            after[i] = before[i] + to_uniform(words[i]) * scale


@kernel
def _measure_row(before, after, words, is_normal, u, scale, lanes, out):
    if not is_normal:
        for i in range(u.size):
            u[i] = to_uniform(words[i])
    _measure(before, after, u, scale, lanes, out)


@kernel
def _add_noise(w, first_block, k0, k1, scale, is_normal, out):
    words = np.empty((3, BLOCK), np.uint32)
    u, old = np.empty(LANES, w.dtype), np.empty(LANES, w.dtype)
    lanes = np.empty((3, _SUM_LANES))
    for b in range(out.shape[0]):
        is_sampled = (first_block + b) % SAMPLED_BLOCKS == 0
        _draw_block(first_block + b, is_normal, False, k0, k1, words)
        out[b] = 0.0
        for row in range(0, min(BLOCK, w.size - b * BLOCK), LANES):
            after = w[b * BLOCK + row : min(b * BLOCK + row + LANES, w.size)]
            before, drawn = old[: after.size], u[: after.size]
            before[:] = after
            _add(before, words[0, row:], words[1, row:], is_normal, scale, drawn, after)
            overflowed = 0
            for i in range(after.size):
                overflowed += not abs(after[i]) < np.inf
            out[b, 3] += overflowed
            if row == 0 and is_sampled:
                _measure_row(before, after, words[0], is_normal, drawn, scale, lanes, out[b])


@kernel
def _add_noise_half(w, is_bfloat, first_block, k0, k1, scale, is_normal, is_stochastic, out):
    words = np.empty((3, BLOCK), np.uint32)
    u, old, new = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    lanes = np.empty((3, _SUM_LANES))
    exponent = np.uint16(0x7F80 if is_bfloat else 0x7C00)
    for b in range(out.shape[0]):
        is_sampled = (first_block + b) % SAMPLED_BLOCKS == 0
        _draw_block(first_block + b, is_normal, is_stochastic, k0, k1, words)
        out[b] = 0.0
        for row in range(0, min(BLOCK, w.size - b * BLOCK), LANES):
            half = w[b * BLOCK + row : min(b * BLOCK + row + LANES, w.size)]
            before, after, drawn = old[: half.size], new[: half.size], u[: half.size]
            widen(half, before.view(np.uint32), is_bfloat)
            _add(before, words[0, row:], words[1, row:], is_normal, scale, drawn, after)
            if is_stochastic:
                narrow_stochastic(after.view(np.uint32), half, is_bfloat, words[2, row:])
            else:
                narrow(after.view(np.uint32), half, is_bfloat)
            largest = np.uint16(0)
            for i in range(half.size):
                largest = max(largest, np.uint16(half[i] & exponent))
            out[b, 3] += largest == exponent
            if row == 0 and is_sampled:
                widen(half, after.view(np.uint32), is_bfloat)
                _measure_row(before, after, words[0], is_normal, drawn, scale, lanes, out[b])


def moments(w: np.ndarray, dtype: str, shift: float) -> np.ndarray:
    """Sum d = w - shift and d * d per block of the contract.

    Args:
        w: flat storage of elements that start on a block boundary, dtype STORAGE[dtype].
        dtype: "F64", "F32", "F16" or "BF16".
        shift: the tensor's first element.
    Returns:
        float64, shape (blocks, 2); not finite if w holds NaN or Inf.
    """
    out = np.empty((-(-w.size // BLOCK), 2))
    if w.dtype == np.uint16:
        _moments_half(w, dtype == "BF16", np.float64(shift), out)
    else:
        _moments(w, np.float64(shift), out)
    return out


def add_noise(
    w: np.ndarray,
    dtype: str,
    *,
    first_block: int,
    key: tuple[int, int],
    scale: float,
    is_normal: bool = False,
    is_stochastic: bool = False,
) -> np.ndarray:
    """Replace w by w + u * scale, in place, rounded once to its dtype.

    Args:
        w: flat storage of elements that start on a block boundary, dtype STORAGE[dtype].
        dtype: "F64", "F32", "F16" or "BF16".
        first_block: index in the tensor of w's first block.
        key: the tensor's key, `noise.key(seed, name)`.
        scale: lam * std, already rounded to the precision of the addition.
        is_normal: draw u from the normal distribution instead of the uniform one.
        is_stochastic: round to 16 bits stochastically. No effect on F32 and F64, which are not rounded again.
    Returns:
        float64, shape (blocks, 4): sums of change * noise, noise^2 and change^2 over the sample (see
        noise.SAMPLED_BLOCKS), and more than 0 if an element overflowed.
    """
    out = np.empty((-(-w.size // BLOCK), 4))
    k0, k1 = np.uint32(key[0]), np.uint32(key[1])
    if w.dtype == np.uint16:
        is_bfloat = dtype == "BF16"
        _add_noise_half(w, is_bfloat, first_block, k0, k1, np.float32(scale), is_normal, is_stochastic, out)
    else:
        _add_noise(w, first_block, k0, k1, w.dtype.type(scale), is_normal, out)
    return out


def to_float(w: np.ndarray, dtype: str) -> float:
    """Return the value of one element of storage, shape (1,)."""
    if w.dtype != np.uint16:
        return float(w[0])
    value = np.empty(1, np.float32)
    widen(w, value.view(np.uint32), dtype == "BF16")
    return float(value[0])
