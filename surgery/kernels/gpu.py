"""Triton kernel that perturbs a CUDA tensor in place, with the bits that `cpu` gives.

Every floating-point step is one IEEE operation. Launched with enable_fp_fusion=False, because a fused multiply-add
would change the bits; free of libdevice, whose log is not the CPU's; and with constants built by `_f64`, because Triton
takes a Python float for a float32. TRITON_INTERPRET=1 runs the same code on CPU tensors.
"""

from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl

from surgery.noise import BLOCK, LANES, NOISE_STREAM, ROUNDING_STREAM, SAMPLED_BLOCKS, SECOND_STREAM, UNIT_STD

_LANES = tl.constexpr(LANES)
_NOISE, _SECOND, _ROUNDING = tl.constexpr(NOISE_STREAM), tl.constexpr(SECOND_STREAM), tl.constexpr(ROUNDING_STREAM)
_UNIT_STD, _SAMPLED_BLOCKS = tl.constexpr(UNIT_STD), tl.constexpr(SAMPLED_BLOCKS)


@triton.jit
def _f64(value: tl.constexpr):
    return tl.full([], value, tl.float64)


@triton.jit
def _philox(c0, c1, c2, k0, k1):
    c3 = tl.zeros_like(c0)
    m0, m1 = tl.full([], 0xD2511F53, tl.uint32), tl.full([], 0xCD9E8D57, tl.uint32)
    w0, w1 = tl.full([], 0x9E3779B9, tl.uint32), tl.full([], 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, m0 + tl.zeros_like(c0)), c0 * m0
        high1, low1 = tl.umulhi(c2, m1 + tl.zeros_like(c2)), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def _words(block, stream: tl.constexpr, k0, k1):
    """Draw the 4096 words of one block: four rows of 1024, as the contract lays them out."""
    lane = tl.arange(0, _LANES).to(tl.uint32)
    first = block * _LANES
    low = (first & 0xFFFFFFFF).to(tl.uint32) + lane
    high = (first >> 32).to(tl.uint32) + tl.zeros_like(lane)
    return _philox(low, high, tl.zeros_like(lane) + stream, k0, k1)


@triton.jit
def _log(x):
    """Natural logarithm of a normal float64 in (0, 1): plain._log, step by step."""
    bits = x.to(tl.int64, bitcast=True)
    fraction = bits & 0xFFFFFFFFFFFFF
    upper = (fraction >= 0x6A09E667F3BCD).to(tl.int64)
    exponent = (bits >> 52) - 1023 + upper
    mantissa = (fraction | ((1023 - upper) << 52)).to(tl.float64, bitcast=True)
    f = mantissa - _f64(1.0)
    s = f / (_f64(2.0) + f)
    z = s * s
    w = z * z
    even = w * (_f64(0.3999999999940941908) + w * (_f64(0.2222219843214978396) + w * _f64(0.1531383769920937332)))
    odd = _f64(0.1818357216161805012) + w * _f64(0.1479819860511658591)
    odd = z * (_f64(0.6666666666666735130) + w * (_f64(0.2857142874366239149) + w * odd))
    half = _f64(0.5) * f * f
    k = exponent.to(tl.float64)
    tail = s * (half + (even + odd)) + k * _f64(1.90821492927058770002e-10)
    return k * _f64(6.93147180369123816490e-01) - ((half - tail) - f)


@triton.jit
def _polynomial(
    r, c7: tl.constexpr, c6: tl.constexpr, c5: tl.constexpr, c4: tl.constexpr, c3: tl.constexpr, c2: tl.constexpr,
    c1: tl.constexpr, c0: tl.constexpr,
):  # fmt: skip
    a = _f64(c7) * r + _f64(c6)
    a = a * r + _f64(c5)
    a = a * r + _f64(c4)
    a = a * r + _f64(c3)
    a = a * r + _f64(c2)
    a = a * r + _f64(c1)
    return a * r + _f64(c0)


@triton.jit
def _inverse_normal(p):
    """Quantile of the standard normal at p in (0, 1): AS 241, PPND16; all three branches, and each lane takes one."""
    q = p - _f64(0.5)
    r = _f64(0.180625) - q * q
    a = _polynomial(
        r, 2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
        13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608,
    )  # fmt: skip
    b = _polynomial(
        r, 5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
        5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0,
    )  # fmt: skip
    central = q * a / b
    is_low = q < _f64(0.0)
    distance = tl.sqrt(_f64(0.0) - _log(tl.where(is_low, p, _f64(1.0) - p)))
    r = distance - _f64(1.6)
    a = _polynomial(
        r, 7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
        3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734,
    )  # fmt: skip
    b = _polynomial(
        r, 1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
        0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0,
    )  # fmt: skip
    tail = a / b
    r = distance - _f64(5.0)
    a = _polynomial(
        r, 2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
        0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772,
    )  # fmt: skip
    b = _polynomial(
        r, 2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
        0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0,
    )  # fmt: skip
    tail = tl.where(distance <= _f64(5.0), tail, a / b)
    tail = tl.where(is_low, _f64(0.0) - tail, tail)
    return tl.where(tl.abs(q) <= _f64(0.425), central, tail)


@triton.jit
def _draw(word, more, is_normal: tl.constexpr):
    """Return u: float32, or the float64 that the normal distribution is computed in."""
    if is_normal:
        bits = (word.to(tl.int64) << 20) + (more >> 12).to(tl.int64)
        p = (bits.to(tl.float64) + _f64(0.5)) * _f64(2.0**-52)
        return _inverse_normal(p) * _f64(_UNIT_STD)
    else:  # noqa: RET505 Triton compiles only the branch that is taken
        return (word >> 8).to(tl.float32) * 5.9604644775390625e-08 - 0.5


@triton.jit
def _widen(half, is_bfloat: tl.constexpr):
    """Return float16 or bfloat16 bits, uint32, as float32: plain.widen."""
    if is_bfloat:
        return (half << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        magnitude = half & 0x7FFF
        subnormal = (magnitude.to(tl.float32) * 5.9604644775390625e-08).to(tl.uint32, bitcast=True)
        bits = tl.where(magnitude < 0x7C00, (magnitude << 13) + 0x38000000, (magnitude << 13) | 0x7F800000)
        bits = tl.where(magnitude < 0x400, subnormal, bits)
        return (bits | ((half & 0x8000) << 16)).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(value, word, is_bfloat: tl.constexpr, is_stochastic: tl.constexpr):
    """Round float32 to float16 or bfloat16 bits, uint32: plain.narrow and plain.narrow_stochastic."""
    bits = value.to(tl.uint32, bitcast=True)
    if is_bfloat:
        if is_stochastic:
            bits += word >> 16
        else:
            bits += 0x7FFF + ((bits >> 16) & 1)
        return bits >> 16
    else:  # noqa: RET505
        magnitude = bits & 0x7FFFFFFF
        units = magnitude.to(tl.float32, bitcast=True) * 16777216.0
        # float16 subnormals are integers here, below 2^10; lanes with more are replaced, and must not overflow before
        units = tl.where(magnitude < 0x38800000, units, 0.0)
        if is_stochastic:
            subnormal = (units.to(tl.float64) + word.to(tl.float64) * _f64(2.0**-32)).to(tl.int32).to(tl.uint32)
            rounded = (magnitude - 0x38000000 + (word >> 19)) >> 13
        else:
            # adding 2^23 rounds to an integer, ties to even, which is then the low bits
            subnormal = (units + 8388608.0).to(tl.uint32, bitcast=True) & 0x7FFFFF
            rounded = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
        rounded = tl.where(magnitude < 0x38800000, subnormal, rounded)
        rounded = tl.where(magnitude >= 0x47800000, tl.full([], 0x7C00, tl.uint32), rounded)
        return rounded | ((bits >> 16) & 0x8000)


@triton.jit
def _is_infinite(value, is_double: tl.constexpr):
    if is_double:
        return ((value.to(tl.int64, bitcast=True) >> 52) & 0x7FF) == 0x7FF
    else:  # noqa: RET505
        return ((value.to(tl.int32, bitcast=True) >> 23) & 0xFF) == 0xFF


@triton.jit
def _add_noise_row(
    w, at, n, scale, word, more, rounding_word, dtype: tl.constexpr, is_normal: tl.constexpr,
    is_stochastic: tl.constexpr,
):  # fmt: skip
    """Replace one row of 1024 elements. Returns its noise, its change, and which elements overflowed."""
    valid = at < n
    u = _draw(word, more, is_normal)
    if dtype == "F64":
        old = tl.load(w + at, mask=valid, other=0.0)
        noise = u.to(tl.float64) * scale
        new = old + noise
        overflowed = _is_infinite(new, True)
        tl.store(w + at, new, mask=valid)
    elif dtype == "F32":
        old = tl.load(w + at, mask=valid, other=0.0)
        noise = u.to(tl.float32) * scale.to(tl.float32)
        new = old + noise
        overflowed = _is_infinite(new, False)
        tl.store(w + at, new, mask=valid)
    else:
        is_bfloat: tl.constexpr = dtype == "BF16"
        exponent: tl.constexpr = 0x7F80 if is_bfloat else 0x7C00
        old = _widen(tl.load(w + at, mask=valid, other=0).to(tl.uint32) & 0xFFFF, is_bfloat)
        noise = u.to(tl.float32) * scale.to(tl.float32)
        half = _narrow(old + noise, rounding_word, is_bfloat, is_stochastic)
        new = _widen(half, is_bfloat)
        overflowed = (half & exponent) == exponent
        tl.store(w + at, half.to(tl.int16), mask=valid)
    zero = tl.zeros_like(scale)
    change = tl.where(valid, (new - old).to(tl.float64), zero)
    return tl.where(valid, noise.to(tl.float64), zero), change, tl.where(valid, overflowed.to(tl.int32), 0)


@triton.jit
def _add_noise(w, job, out, dtype: tl.constexpr, is_normal: tl.constexpr, is_stochastic: tl.constexpr):
    """Perturb one block of 4096 elements. job: k0, k1, first block, number of elements, and the bits of scale."""
    program = tl.program_id(0).to(tl.int64)
    k0, k1 = tl.load(job).to(tl.uint32), tl.load(job + 1).to(tl.uint32)
    block = tl.load(job + 2) + program
    n = tl.load(job + 3)
    scale = tl.load(job + 4).to(tl.float64, bitcast=True)
    at = program * (4 * _LANES) + tl.arange(0, _LANES)
    a0, a1, a2, a3 = _words(block, _NOISE, k0, k1)
    b0, b1, b2, b3 = a0, a1, a2, a3
    if is_normal:
        b0, b1, b2, b3 = _words(block, _SECOND, k0, k1)
    c0, c1, c2, c3 = a0, a1, a2, a3
    if is_stochastic:
        c0, c1, c2, c3 = _words(block, _ROUNDING, k0, k1)
    noise, change, over = _add_noise_row(w, at, n, scale, a0, b0, c0, dtype, is_normal, is_stochastic)
    _, _, over1 = _add_noise_row(w, at + _LANES, n, scale, a1, b1, c1, dtype, is_normal, is_stochastic)
    _, _, over2 = _add_noise_row(w, at + 2 * _LANES, n, scale, a2, b2, c2, dtype, is_normal, is_stochastic)
    _, _, over3 = _add_noise_row(w, at + 3 * _LANES, n, scale, a3, b3, c3, dtype, is_normal, is_stochastic)
    is_sampled = block % _SAMPLED_BLOCKS == 0
    noise, change = tl.where(is_sampled, noise, _f64(0.0)), tl.where(is_sampled, change, _f64(0.0))
    sums = out + program * 4
    tl.store(sums, tl.sum(change * noise, axis=0))
    tl.store(sums + 1, tl.sum(noise * noise, axis=0))
    tl.store(sums + 2, tl.sum(change * change, axis=0))
    tl.store(sums + 3, tl.sum(over + over1 + over2 + over3, axis=0).to(tl.float64))


def add_noise(
    w: torch.Tensor,
    dtype: str,
    *,
    first_block: int,
    key: tuple[int, int],
    scale: float,
    is_normal: bool = False,
    is_stochastic: bool = False,
) -> torch.Tensor:
    """Replace w by w + u * scale, in place, rounded once to its dtype: cpu.add_noise, with the same bits in w.

    Args:
        w: flat, contiguous, on a GPU; its first element starts a block.
        dtype, first_block, key, scale, is_normal, is_stochastic: see cpu.add_noise.
    Returns:
        What cpu.add_noise returns, on w's device; its sums are added in another order.
    """
    blocks = triton.cdiv(w.numel(), BLOCK)
    # As a tensor: Triton would pass the scale as float32, and would compile anew for kinds of integers.
    values = [*key, first_block, w.numel(), int(np.float64(scale).view(np.int64))]
    job = torch.tensor(values, dtype=torch.int64).to(w.device)
    out = torch.empty((blocks, 4), dtype=torch.float64, device=w.device)
    storage = w.view(torch.int16) if w.element_size() == 2 else w
    is_stochastic = is_stochastic and w.element_size() == 2
    with torch.cuda.device(w.device) if w.is_cuda else nullcontext():
        _add_noise[(blocks,)](storage, job, out, dtype, is_normal, is_stochastic, enable_fp_fusion=False)
    return out
