"""Philox4x32-10 in numba: the random words of a block, and the uniform or normal u made of them."""

import numpy as np
from numba import njit

from surgery.kernels.jit import kernel
from surgery.noise import LANES, UNIT_STD

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)


@njit(inline="always")
def _philox(c0, c1, c2, k0, k1):
    c3 = np.uint32(0)
    for _ in range(10):
        p0 = _M0 * np.uint64(c0)
        p1 = _M1 * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32(p1 >> np.uint64(32)) ^ c1 ^ k0,
            np.uint32(p1),
            np.uint32(p0 >> np.uint64(32)) ^ c3 ^ k1,
            np.uint32(p0),
        )
        k0 = np.uint32(k0 + _W0)
        k1 = np.uint32(k1 + _W1)
    return c0, c1, c2, c3


@kernel
def philox_block(block, stream, k0, k1, words):
    """Write the 4096 words of one block: `words[e % BLOCK]` belongs to element e = block * BLOCK + e % BLOCK."""
    first = np.uint64(block) * np.uint64(LANES)
    low = np.uint32(first)
    high = np.uint32(first >> np.uint64(32))
    for i in range(LANES):
        a, b, c, d = _philox(np.uint32(low + np.uint32(i)), high, np.uint32(stream), k0, k1)
        words[i] = a
        words[LANES + i] = b
        words[2 * LANES + i] = c
        words[3 * LANES + i] = d


@njit(inline="always")
def _bits(x):
    return np.float64(x).view(np.int64)


@njit(inline="always")
def _from_bits(bits):
    return np.int64(bits).view(np.float64)


@njit
def _log(x):
    """Natural logarithm of a normal float64 in (0, 1), as fdlibm's e_log.c: only + - * / on float64, so one result."""
    bits = _bits(x)
    fraction = bits & np.int64(0xFFFFFFFFFFFFF)
    # the mantissa is taken in [sqrt(1/2), sqrt(2)), so that f is small
    upper = np.int64(fraction >= np.int64(0x6A09E667F3BCD))
    exponent = (bits >> np.int64(52)) - np.int64(1023) + upper
    mantissa = _from_bits(fraction | ((np.int64(1023) - upper) << np.int64(52)))
    f = mantissa - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (0.3999999999940941908 + w * (0.2222219843214978396 + w * 0.1531383769920937332))
    odd = z * (
        0.6666666666666735130 + w * (0.2857142874366239149 + w * (0.1818357216161805012 + w * 0.1479819860511658591))
    )
    half = 0.5 * f * f
    k = np.float64(exponent)
    tail = s * (half + (even + odd)) + k * 1.90821492927058770002e-10
    return k * 6.93147180369123816490e-01 - ((half - tail) - f)


@njit(inline="always")
def _inverse_normal(p):
    """Quantile of the standard normal at p in (0, 1): AS 241, PPND16 (Wichura 1988), relative error about 1e-16."""
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        a = 2509.0809287301226727 * r + 33430.575583588128105
        a = a * r + 67265.770927008700853
        a = a * r + 45921.953931549871457
        a = a * r + 13731.693765509461125
        a = a * r + 1971.5909503065514427
        a = a * r + 133.14166789178437745
        a = a * r + 3.387132872796366608
        b = 5226.495278852545925 * r + 28729.085735721942674
        b = b * r + 39307.89580009271061
        b = b * r + 21213.794301586595867
        b = b * r + 5394.1960214247511077
        b = b * r + 687.1870074920579083
        b = b * r + 42.313330701600911252
        b = b * r + 1.0
        return q * a / b
    r = np.sqrt(-_log(p if q < 0.0 else 1.0 - p))
    if r <= 5.0:
        r -= 1.6
        a = 7.7454501427834140764e-4 * r + 0.0227238449892691845833
        a = a * r + 0.24178072517745061177
        a = a * r + 1.27045825245236838258
        a = a * r + 3.64784832476320460504
        a = a * r + 5.7694972214606914055
        a = a * r + 4.6303378461565452959
        a = a * r + 1.42343711074968357734
        b = 1.05075007164441684324e-9 * r + 5.475938084995344946e-4
        b = b * r + 0.0151986665636164571966
        b = b * r + 0.14810397642748007459
        b = b * r + 0.68976733498510000455
        b = b * r + 1.6763848301838038494
        b = b * r + 2.05319162663775882187
        b = b * r + 1.0
    else:
        r -= 5.0
        a = 2.01033439929228813265e-7 * r + 2.71155556874348757815e-5
        a = a * r + 0.0012426609473880784386
        a = a * r + 0.026532189526576123093
        a = a * r + 0.29656057182850489123
        a = a * r + 1.7848265399172913358
        a = a * r + 5.4637849111641143699
        a = a * r + 6.6579046435011037772
        b = 2.04426310338993978564e-15 * r + 1.4215117583164458887e-7
        b = b * r + 1.8463183175100546818e-5
        b = b * r + 7.868691311456132591e-4
        b = b * r + 0.0148753612908506148525
        b = b * r + 0.13692988092273580531
        b = b * r + 0.59983220655588793769
        b = b * r + 1.0
    return -(a / b) if q < 0.0 else a / b


@njit(inline="always")
def to_uniform(word):
    """Return u of an element from its word of the noise stream. Exact in float32."""
    return np.float32(word >> np.uint32(8)) * np.float32(2.0**-24) - np.float32(0.5)


@kernel
def normal(words, more_words, u):
    """Write u of a run of elements from their words of both noise streams."""
    for i in range(u.size):
        bits = (np.uint64(words[i]) << np.uint64(20)) + np.uint64(more_words[i] >> np.uint32(12))
        u[i] = _inverse_normal((np.float64(bits) + 0.5) * 2.0**-52) * UNIT_STD
