"""The CPU kernels that measure and perturb raw tensor storage in place, a block of 4096 elements at a time.

float16 and bfloat16 travel as uint16 arrays; float32 and float64 as themselves. C does the work, or NumPy where it was
not compiled, with the same bits.
"""

import numpy as np

from surgery.kernels import backends, plain
from surgery.noise import BLOCK

STORAGE = {"F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
"""Floating-point dtypes, in safetensors' names, and the numpy dtype in which their kernels take them."""


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
    backends.on_cpu().moments(w, dtype, shift, out)
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
        noise.SAMPLED_BLOCKS), and 1 if an element overflowed, else 0.
    """
    out = np.empty((-(-w.size // BLOCK), 4))
    backends.on_cpu().add_noise(w, dtype, first_block, key, scale, is_normal, is_stochastic, out)
    return out


def to_float(w: np.ndarray, dtype: str) -> float:
    """Return the value of one element of storage, shape (1,)."""
    return float(plain.widen(w, dtype)[0])
