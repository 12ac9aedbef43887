"""The noise contract on the CPU: numba kernels over raw tensor storage, a block of 4096 elements at a time.

float16 and bfloat16 travel as uint16 arrays; float32 and float64 as themselves. No kernel here is compiled with
fastmath: reassociation or fusing would change the bits. Inner loops are short and plain, so that they vectorize.
"""

import numpy as np

from surgery.kernels.halves import narrow, narrow_stochastic, widen
from surgery.kernels.jit import kernel
from surgery.kernels.philox import draw, philox_block
from surgery.noise import BLOCK, LANES, ROUNDING_STREAM

STORAGE = {"F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
"""Floating-point dtypes, in safetensors' names, and the numpy dtype in which their kernels take them."""

_SAMPLE_LANES = 128


@kernel
def _fold(t):
    """Sum 1024 lanes by halves: a fixed order that vectorizes."""
    h = LANES // 2
    while h > 0:
        for i in range(h):
            t[i] += t[h + i]
        h //= 2
    return t[0]


@kernel
def _block_moments(x, shift, s1, s2, out):
    """Sum d = x - shift and d * d over one block in the contract's order. x: 4096 values, the first n valid."""
    for i in range(LANES):
        d0 = np.float64(x[i]) - shift
        d1 = np.float64(x[LANES + i]) - shift
        d2 = np.float64(x[2 * LANES + i]) - shift
        d3 = np.float64(x[3 * LANES + i]) - shift
        s1[i] = (d0 + d1) + (d2 + d3)
        s2[i] = (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    out[0] = _fold(s1)
    out[1] = _fold(s2)


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
        _block_moments(block, shift, s1, s2, out[b])


@kernel
def _moments_half(w, is_bfloat, shift, out):
    x = np.empty(BLOCK, np.float32)
    s1, s2 = np.empty(LANES), np.empty(LANES)
    for b in range(out.shape[0]):
        block = w[b * BLOCK : (b + 1) * BLOCK]
        widen(block, x.view(np.uint32), is_bfloat)
        x[block.size :] = shift
        _block_moments(x, shift, s1, s2, out[b])


@kernel
def _measure(old, new, noise, n, lanes, out):
    """Sum (change * noise, noise^2, change^2) over the first 1024 elements of a block, a quarter of it."""
    lanes[:] = 0.0
    a, b, c = lanes[0], lanes[1], lanes[2]
    sample = min(n, LANES)
    whole = sample - sample % _SAMPLE_LANES
    for j in range(0, whole, _SAMPLE_LANES):
        for i in range(_SAMPLE_LANES):
            change, drawn = np.float64(new[j + i] - old[j + i]), np.float64(noise[j + i])
            a[i] += change * drawn
            b[i] += drawn * drawn
            c[i] += change * change
    for i in range(sample - whole):
        change, drawn = np.float64(new[whole + i] - old[whole + i]), np.float64(noise[whole + i])
        a[i] += change * drawn
        b[i] += drawn * drawn
        c[i] += change * change
    out[0] = np.sum(a)
    out[1] = np.sum(b)
    out[2] = np.sum(c)


@kernel
def _add_noise(w, first_block, k0, k1, scale, normal, out):
    words, more_words = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    u, noise, old = np.empty(BLOCK, w.dtype), np.empty(BLOCK, w.dtype), np.empty(BLOCK, w.dtype)
    lanes = np.empty((3, _SAMPLE_LANES))
    for b in range(out.shape[0]):
        block = w[b * BLOCK : (b + 1) * BLOCK]
        draw(first_block + b, normal, k0, k1, words, more_words, u)
        overflowed = 0
        for i in range(block.size):
            old[i] = block[i]
            noise[i] = u[i] * scale
            block[i] = old[i] + noise[i]
            overflowed += not np.isfinite(block[i])
        _measure(old, block, noise, block.size, lanes, out[b])
        out[b, 3] = overflowed


@kernel
def _add_noise_half(w, is_bfloat, first_block, k0, k1, scale, normal, stochastic, out):
    words, more_words = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    u, noise = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    old, new = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    lanes = np.empty((3, _SAMPLE_LANES))
    exponent = np.uint16(0x7F80 if is_bfloat else 0x7C00)
    for b in range(out.shape[0]):
        half = w[b * BLOCK : (b + 1) * BLOCK]
        draw(first_block + b, normal, k0, k1, words, more_words, u)
        widen(half, old.view(np.uint32), is_bfloat)
        for i in range(half.size):
            noise[i] = u[i] * scale
            new[i] = old[i] + noise[i]
        if stochastic:
            philox_block(first_block + b, ROUNDING_STREAM, k0, k1, words)
            narrow_stochastic(new.view(np.uint32), half, is_bfloat, words)
        else:
            narrow(new.view(np.uint32), half, is_bfloat)
        widen(half[:LANES], new.view(np.uint32), is_bfloat)
        _measure(old, new, noise, half.size, lanes, out[b])
        overflowed = 0
        for i in range(half.size):
            overflowed += (half[i] & exponent) == exponent
        out[b, 3] = overflowed


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
    normal: bool = False,
    stochastic: bool = False,
) -> np.ndarray:
    """Replace w by w + u * scale, in place, rounded once to its dtype.

    Args:
        w: flat storage of elements that start on a block boundary, dtype STORAGE[dtype].
        dtype: "F64", "F32", "F16" or "BF16".
        first_block: index in the tensor of w's first block.
        key: the tensor's key, `noise.key(seed, name)`.
        scale: lam * std, already rounded to the precision of the addition.
        normal: draw u from the normal distribution instead of the uniform one.
        stochastic: round to 16 bits stochastically. No effect on F32 and F64, which are not rounded again.
    Returns:
        float64, shape (blocks, 4): sums of change * noise, noise^2 and change^2 over the first 1024 elements of each
        block, and the number of elements that overflowed.
    """
    out = np.empty((-(-w.size // BLOCK), 4))
    k0, k1 = np.uint32(key[0]), np.uint32(key[1])
    if w.dtype == np.uint16:
        is_bfloat = dtype == "BF16"
        _add_noise_half(w, is_bfloat, first_block, k0, k1, np.float32(scale), normal, stochastic, out)
    else:
        _add_noise(w, first_block, k0, k1, w.dtype.type(scale), normal, out)
    return out


def to_float(w: np.ndarray, dtype: str) -> float:
    """Return the value of one element of storage, shape (1,)."""
    if w.dtype != np.uint16:
        return float(w[0])
    value = np.empty(1, np.float32)
    widen(w, value.view(np.uint32), dtype == "BF16")
    return float(value[0])
