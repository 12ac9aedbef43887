"""float16 and bfloat16 as uint16 bits in numba: exact widening to float32, and rounding, to nearest or stochastic."""

import numpy as np

from surgery.kernels.jit import kernel


@kernel
def widen(half, bits, is_bfloat):
    """Write float16 or bfloat16 values as float32, exactly. `bits` is the uint32 view of the float32 output."""
    if is_bfloat:
        for i in range(half.size):
            bits[i] = np.uint32(half[i]) << np.uint32(16)
        return
    values = bits.view(np.float32)
    for i in range(half.size):
        magnitude = np.uint32(half[i]) & np.uint32(0x7FFF)
        if magnitude < np.uint32(0x400):  # subnormal: an integer multiple of 2^-24
            values[i] = np.float32(magnitude) * np.float32(2.0**-24)
        elif magnitude < np.uint32(0x7C00):
            bits[i] = (magnitude << np.uint32(13)) + np.uint32(112 << 23)
        else:  # Inf or NaN
            bits[i] = (magnitude << np.uint32(13)) | np.uint32(0x7F800000)
        bits[i] |= (np.uint32(half[i]) & np.uint32(0x8000)) << np.uint32(16)


@kernel
def narrow(bits, half, is_bfloat):
    """Round float32 values to float16 or bfloat16, to nearest, ties to even."""
    if is_bfloat:
        for i in range(half.size):
            b = bits[i]
            half[i] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        return
    values = bits.view(np.float32)
    for i in range(half.size):
        b = bits[i]
        magnitude = np.uint32(b & np.uint32(0x7FFFFFFF))
        if magnitude < np.uint32(0x38800000):  # subnormal: rint rounds ties to even
            rounded = np.uint32(np.rint(abs(values[i]) * np.float32(2.0**24)))
        else:
            odd = (magnitude >> np.uint32(13)) & np.uint32(1)
            rounded = (magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
        if magnitude >= np.uint32(0x47800000):
            rounded = np.uint32(0x7C00)
        half[i] = np.uint16(rounded | ((b >> np.uint32(16)) & np.uint32(0x8000)))


@kernel
def narrow_stochastic(bits, half, is_bfloat, words):
    """Round float32 values up or down with probability in proportion, by the bits of the rounding stream."""
    if is_bfloat:
        for i in range(half.size):
            half[i] = np.uint16((bits[i] + (words[i] >> np.uint32(16))) >> np.uint32(16))
        return
    values = bits.view(np.float32)
    for i in range(half.size):
        b = bits[i]
        magnitude = np.uint32(b & np.uint32(0x7FFFFFFF))
        if magnitude < np.uint32(0x38800000):
            unit = np.float64(abs(values[i])) * 2.0**24
            rounded = np.uint32(np.floor(unit + np.float64(words[i]) * 2.0**-32))
        else:
            rounded = (magnitude - np.uint32(112 << 23) + (words[i] >> np.uint32(19))) >> np.uint32(13)
        if magnitude >= np.uint32(0x47800000):
            rounded = np.uint32(0x7C00)
        half[i] = np.uint16(rounded | ((b >> np.uint32(16)) & np.uint32(0x8000)))
