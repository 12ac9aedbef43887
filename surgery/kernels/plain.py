"""The arithmetic of the noise contract, the sums of inspect and diff, and masks, in NumPy: to read, and where C is not.

Every function fills arrays that it is given, as those of `native` do and with the same bits. Storage is flat, starts on
a block boundary, and has dtype cpu.STORAGE[dtype]: float16 and bfloat16 travel as uint16.
"""

from collections.abc import Iterator

import numpy as np

from surgery.noise import BLOCK, LANES, NOISE_STREAM, ROUNDING_STREAM, SAMPLED_BLOCKS, SECOND_STREAM, UNIT_STD

_WARM_UP = 18  # rounds of SFC64 that nobody sees
_STEP = 64  # blocks at a time: some MB for each temporary
_CENTRAL = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_MIDDLE = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)  # fmt: skip
INF = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of Inf: those of finite values are smaller, those of NaN greater, but for the sign."""
_SIGNED = {8: np.int64, 4: np.int32, 2: np.int16}


# -- words, and the u made of them ------------------------------------------------------------------------------------


def words(first_block: int, blocks: int, stream: int, key: tuple[int, int]) -> np.ndarray:
    """Draw the words of some blocks by Philox4x32-10 (Salmon et al., SC 2011): uint32, flat, one for each element."""
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = np.arange(blocks * LANES, dtype=np.uint64) + np.uint64(first_block * LANES)
    c0, c1 = counter & low32, counter >> shift
    c2, c3 = np.full_like(counter, stream), np.zeros_like(counter)
    for round in range(10):
        k0, k1 = (np.uint64((k + round * w) & 0xFFFFFFFF) for k, w in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low32, (p0 >> shift) ^ c3 ^ k1, p0 & low32
    rows = np.stack([c.reshape(blocks, LANES) for c in (c0, c1, c2, c3)], axis=1)
    return rows.astype(np.uint32).reshape(-1)


def to_uniform(word: np.ndarray) -> np.ndarray:
    """Return u in [-0.5, 0.5), float32, exact."""
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24) - np.float32(0.5)


def to_normal(word: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return u with the uniform's standard deviation, float64, from the words of both noise streams."""
    bits = (word.astype(np.uint64) << np.uint64(20)) + (second >> np.uint32(12))
    u: np.ndarray = _inverse_normal((bits.astype(np.float64) + 0.5) * 2.0**-52) * UNIT_STD
    return u


def _inverse_normal(p: np.ndarray) -> np.ndarray:
    """Quantile of the standard normal at p in (0, 1): AS 241, PPND16 (Wichura 1988), relative error about 1e-16."""
    q = p - 0.5
    r = 0.180625 - q * q
    central = q * _polynomial(r, _CENTRAL[0]) / _polynomial(r, _CENTRAL[1])
    r = np.sqrt(-_log(np.where(q < 0.0, p, 1.0 - p)))
    near, far = r - 1.6, r - 5.0
    tail = np.where(
        r <= 5.0,
        _polynomial(near, _MIDDLE[0]) / _polynomial(near, _MIDDLE[1]),
        _polynomial(far, _FAR[0]) / _polynomial(far, _FAR[1]),
    )
    z: np.ndarray = np.where(np.abs(q) <= 0.425, central, np.where(q < 0.0, -tail, tail))
    return z


def _polynomial(r: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    a = coefficients[0] * r + coefficients[1]
    for c in coefficients[2:]:
        a = a * r + c
    return a


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of normal numbers in (0, 1), as fdlibm's e_log.c: only + - * /, so that there is one result."""
    bits = x.view(np.int64)
    fraction = bits & 0xFFFFFFFFFFFFF
    upper = (fraction >= 0x6A09E667F3BCD).astype(np.int64)  # the mantissa is in [sqrt(1/2), sqrt(2)): f is small
    k = ((bits >> 52) - 1023 + upper).astype(np.float64)
    f = (fraction | ((1023 - upper) << 52)).view(np.float64) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (0.3999999999940941908 + w * (0.2222219843214978396 + w * 0.1531383769920937332))
    odd = z * (
        0.6666666666666735130 + w * (0.2857142874366239149 + w * (0.1818357216161805012 + w * 0.1479819860511658591))
    )
    half = 0.5 * f * f
    tail = s * (half + (even + odd)) + k * 1.90821492927058770002e-10
    return k * 6.93147180369123816490e-01 - ((half - tail) - f)


# -- storage and values -----------------------------------------------------------------------------------------------


def widen(w: np.ndarray, dtype: str) -> np.ndarray:
    """Return storage as float32, exactly; F64 as it is."""
    if dtype == "BF16":
        return (w.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return w.view(np.float16).astype(np.float32) if dtype == "F16" else w


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 to F16 or BF16 storage, to nearest, ties to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def narrow_stochastic(values: np.ndarray, dtype: str, word: np.ndarray) -> np.ndarray:
    """Round float32 to F16 or BF16 storage, up or down with probability in proportion, by the rounding stream."""
    bits = values.view(np.uint32)
    if dtype == "BF16":
        return ((bits + (word >> np.uint32(16))) >> np.uint32(16)).astype(np.uint16)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    is_subnormal = magnitude < 0x38800000
    units = np.where(is_subnormal, magnitude, np.uint32(0)).view(np.float32).astype(np.float64) * 2.0**24
    subnormal = np.floor(units + word * 2.0**-32).astype(np.uint32)
    normal = (magnitude - np.uint32(112 << 23) + (word >> np.uint32(19))) >> np.uint32(13)
    rounded = np.where(magnitude >= 0x47800000, np.uint32(0x7C00), np.where(is_subnormal, subnormal, normal))
    half: np.ndarray = rounded | ((bits >> np.uint32(16)) & np.uint32(0x8000))
    return half.astype(np.uint16)


# -- sums over blocks -------------------------------------------------------------------------------------------------


def _runs(*arrays: np.ndarray) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Cut storage into runs of some blocks; yield which blocks they are, and the runs."""
    for start in range(0, arrays[0].size, _STEP * BLOCK):
        parts = [array[start : start + _STEP * BLOCK] for array in arrays]
        yield slice(start // BLOCK, start // BLOCK + -(-parts[0].size // BLOCK)), parts


def _rows(x: np.ndarray) -> np.ndarray:
    """Return values as blocks of four rows of lanes, padded with zeros: float64, shape (blocks, 4, LANES)."""
    return np.pad(x.astype(np.float64), (0, -x.size % BLOCK)).reshape(-1, 4, LANES)


def _sum(rows: np.ndarray) -> np.ndarray:
    """Sum each block in the contract's order: the rows, then the lanes by halves."""
    return _fold((rows[:, 0] + rows[:, 1]) + (rows[:, 2] + rows[:, 3]))


def _fold(t: np.ndarray) -> np.ndarray:
    while t.shape[1] > 1:
        half = t.shape[1] // 2
        t = t[:, :half] + t[:, half:]
    return t[:, 0]


@np.errstate(over="ignore", invalid="ignore")
def moments(w: np.ndarray, dtype: str, shift: float, out: np.ndarray) -> None:
    """Fill out, shape (blocks, 2): see cpu.moments."""
    for blocks, (part,) in _runs(w):
        _moments(widen(part, dtype), shift, out[blocks])


def _moments(x: np.ndarray, shift: float, out: np.ndarray) -> None:
    d = _rows(x.astype(np.float64) - shift)
    out[:, 0], out[:, 1] = _sum(d), _sum(d * d)


@np.errstate(over="ignore", invalid="ignore")
def summarize(w: np.ndarray, dtype: str, shift: float, out: np.ndarray, keys: np.ndarray, counts: np.ndarray) -> None:
    """Fill out as `moments` does, but what is not finite counts as `shift`; see sums.Sums.

    Args:
        keys: int64, shape (2,): the lowest and the highest of the finite elements' bits, as integers that sort as the
            floats do; they are lowered and raised.
        counts: int64, shape (2,): how many are NaN, and how many Inf or -Inf; they are added to.
    """
    for blocks, (part,) in _runs(w):
        bits = part.view(_SIGNED[part.itemsize])
        mask, inf = np.iinfo(bits.dtype).max, INF[dtype]
        is_finite = (bits & mask) < inf
        counts += [np.count_nonzero((bits & mask) > inf), np.count_nonzero((bits & mask) == inf)]
        if is_finite.any():
            finite = bits[is_finite]
            sorting = np.where(finite < 0, finite ^ mask, finite)
            keys[:] = min(keys[0], int(sorting.min())), max(keys[1], int(sorting.max()))
        x = widen(part, dtype)
        _moments(np.where(is_finite, x, x.dtype.type(shift)), shift, out[blocks])


@np.errstate(over="ignore", invalid="ignore")
def compare(a: np.ndarray, b: np.ndarray, dtype: str, out: np.ndarray, counts: np.ndarray) -> None:
    """Fill out, shape (blocks, 4): see sums.PairSums.

    Args:
        counts: int64, shape (3,): how many pairs differ, how many of those are not finite, and how many pairs are not
            finite; they are added to.
    """
    for blocks, (one, other) in _runs(a, b):
        bits, others = (part.view(_SIGNED[part.itemsize]) for part in (one, other))
        mask = np.iinfo(bits.dtype).max
        is_changed = bits != others
        is_broken = np.maximum(bits & mask, others & mask) >= INF[dtype]
        counts += [np.count_nonzero(part) for part in (is_changed, is_changed & is_broken, is_broken)]
        x, y = (_rows(np.where(is_broken, 0, widen(part, dtype))) for part in (one, other))
        d = y - x
        out[blocks] = np.stack([_sum(d * d), _sum(x * x), _sum(y * y), np.abs(d).max(axis=(1, 2))], axis=1)


# -- noise ------------------------------------------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")
def add_noise(
    w: np.ndarray,
    dtype: str,
    first_block: int,
    key: tuple[int, int],
    scale: float,
    is_normal: bool,
    is_stochastic: bool,
    out: np.ndarray,
) -> None:
    """Replace w by w + u * scale, in place, and fill out, shape (blocks, 4): see cpu.add_noise."""
    for blocks, (part,) in _runs(w):
        first, n = first_block + blocks.start, blocks.stop - blocks.start
        word = words(first, n, NOISE_STREAM, key)[: part.size]
        u = to_normal(word, words(first, n, SECOND_STREAM, key)[: part.size]) if is_normal else to_uniform(word)
        old = widen(part, dtype).copy()
        drawn = u.astype(old.dtype) * old.dtype.type(scale)
        new = old + drawn
        if part.dtype == np.uint16:
            rounding = words(first, n, ROUNDING_STREAM, key)[: part.size] if is_stochastic else None
            part[:] = narrow(new, dtype) if rounding is None else narrow_stochastic(new, dtype, rounding)
        else:
            part[:] = new
        out[blocks] = _effect(widen(part, dtype), old, drawn, first)


def _effect(new: np.ndarray, old: np.ndarray, drawn: np.ndarray, first_block: int) -> np.ndarray:
    """Sum what became of the sample, and tell which blocks overflowed: float64, shape (blocks, 4)."""
    change, noise = (_rows(values)[:, 0] for values in (new - old, drawn))
    is_infinite = (_rows(~np.isfinite(new)) > 0).any(axis=(1, 2))
    sums = np.stack([_fold(change * noise), _fold(noise * noise), _fold(change * change)], axis=1)
    sums[(first_block + np.arange(len(sums))) % SAMPLED_BLOCKS != 0] = 0.0
    return np.column_stack([sums, is_infinite])


# -- Mixout's masks ---------------------------------------------------------------------------------------------------


def draw_mask(seed: int, threshold: int, out: np.ndarray) -> None:
    """Fill out, flat bools, with m: whether an element's word is below the threshold."""
    streams, rounds = 8, BLOCK // 16
    b = np.arange(-(-out.size // BLOCK) * streams, dtype=np.uint64)
    a, c = np.full_like(b, seed), np.full_like(b, 0x9E3779B97F4A7C15)
    words = np.empty((rounds, b.size), np.uint64)
    for counter in range(1, _WARM_UP + rounds + 1):  # SFC64 of Chris Doty-Humphrey's PractRand
        drawn = a + b + np.uint64(counter)
        a, b = b ^ (b >> np.uint64(11)), c + (c << np.uint64(3))
        c = ((c << np.uint64(24)) | (c >> np.uint64(40))) + drawn
        if counter > _WARM_UP:
            words[counter - _WARM_UP - 1] = drawn
    blocks = words.reshape(rounds, -1, streams).transpose(1, 0, 2)
    pairs = np.stack([blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32)], axis=-1)
    out[:] = pairs.reshape(-1)[: out.size] < threshold


@np.errstate(over="ignore", invalid="ignore")
def mix(w: np.ndarray, w_pre: np.ndarray, seed: int, threshold: int, scale: float, out: np.ndarray) -> None:
    """Fill out with w + (w - w_pre) * (scale - 1) where m is 1, and w_pre elsewhere; float32 or float64."""
    mask = np.empty(w.shape, bool)
    draw_mask(seed, threshold, mask)
    out[:] = np.where(mask, w + (w - w_pre) * (w.dtype.type(scale) - w.dtype.type(1)), w_pre)


@np.errstate(over="ignore", invalid="ignore")
def gate(grad: np.ndarray, seed: int, threshold: int, scale: float, out: np.ndarray) -> None:
    """Fill out with grad * scale where m is 1, and 0 elsewhere; float32 or float64."""
    mask = np.empty(grad.shape, bool)
    draw_mask(seed, threshold, mask)
    out[:] = np.where(mask, grad * grad.dtype.type(scale), 0)
