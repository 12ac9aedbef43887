"""The dtypes of safetensors: bits per element, and those that hold one real number each as NumPy storage and as values.

A new dtype for files begins here; those that get noise are `noisytune.FLOATS`, torch's are in `checkpoint/pickles`.
"""

from functools import cache

import numpy as np

BITS = {
    "BOOL": 8,
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""Bits per element of every dtype of safetensors 0.8, in its order."""
_STORAGE = {
    "F64": "f8",
    "F32": "f4",
    **dict.fromkeys(("F16", "BF16"), "u2"),
    **{f"{kind}{8 * size}": f"{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)},
    **dict.fromkeys(("BOOL", "F8_E8M0", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), "u1"),
}
_MANTISSA_AND_BIAS = {"F8_E5M2": (2, 15), "F8_E4M3": (3, 7), "F8_E4M3FNUZ": (3, 8), "F8_E5M2FNUZ": (2, 16)}


def is_measurable(dtype: str) -> bool:
    """Tell whether elements of this dtype can be read as numbers: not those that share bytes, and not complex ones."""
    return dtype in _STORAGE


def storage(data: memoryview, dtype: str) -> np.ndarray:
    """View bytes as flat storage of a measurable dtype; float16 and bfloat16 as uint16, smaller floats as uint8."""
    return np.frombuffer(data, _STORAGE[dtype])


def to_numbers(w: np.ndarray, dtype: str) -> tuple[np.ndarray, str]:
    """Return storage of a measurable dtype as F32 or F64 numbers, and which of the two.

    Exact, but for integers beyond 2^53.
    """
    if dtype in ("F32", "F64"):
        return w, dtype
    if dtype == "BF16":
        return (w.astype(np.uint32) << 16).view(np.float32), "F32"
    if dtype == "F16":
        return w.view(np.float16).astype(np.float32), "F32"
    if dtype.startswith("F8"):
        return _float8(dtype)[w], "F32"
    return w.astype(np.float64), "F64"


@cache
def _float8(dtype: str) -> np.ndarray:
    """Return the values of the 256 bytes: Micikevicius et al., arXiv 2209.05433; for FNUZ Noune et al., 2206.02915."""
    code = np.arange(256)
    if dtype == "F8_E8M0":  # scales: powers of two
        return np.where(code == 255, np.nan, np.ldexp(1.0, code - 127)).astype(np.float32)
    bits, bias = _MANTISSA_AND_BIAS[dtype]
    mantissa, exponent = code % 2**bits, code % 128 >> bits
    significand = np.where(exponent > 0, mantissa + 2**bits, mantissa)
    value = np.ldexp(significand, np.maximum(exponent, 1) - bias - bits)
    if dtype == "F8_E5M2":
        value = np.where(exponent < 31, value, np.where(mantissa == 0, np.inf, np.nan))
    elif dtype == "F8_E4M3":
        value[0x7F] = np.nan
    value = np.concatenate([value[:128], -value[:128]])
    if dtype.endswith("FNUZ"):
        value[0x80] = np.nan  # in place of -0
    return value.astype(np.float32)
