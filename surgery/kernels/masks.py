"""Mixout's element masks on the CPU: m ~ Bernoulli(share) for each element, made from a seed wherever it is needed.

C makes a mask and uses it in one pass, or NumPy where it was not compiled, with the same bits.
"""

import numpy as np

from surgery.kernels import backends


def draw_mask(seed: int, share: float, size: int) -> np.ndarray:
    """Draw m, bools of shape (size,).

    Args:
        seed: in [0, 2^64).
        share: the probability of a 1, in [0, 1], which is kept to 2^-32.
    """
    out = np.empty(size, bool)
    backends.on_cpu().draw_mask(seed, _threshold(share), out)
    return out


def mix(w: np.ndarray, w_pre: np.ndarray, *, seed: int, share: float, scale: float, out: np.ndarray) -> None:
    """Fill out with w_pre + (w - w_pre) * m * scale, and with w_pre to the bit where m is 0.

    Args:
        w, w_pre, out: flat, of one shape and of one dtype, float32 or float64, in which it is computed.
    """
    backends.on_cpu().mix(w, w_pre, seed, _threshold(share), scale, out)


def gate(grad: np.ndarray, *, seed: int, share: float, scale: float, out: np.ndarray) -> None:
    """Fill out with grad * m * scale, and with 0 where m is 0, whatever grad is there. See mix."""
    backends.on_cpu().gate(grad, seed, _threshold(share), scale, out)


def _threshold(share: float) -> int:
    return min(round(share * 2**32), 2**32 - 1)
