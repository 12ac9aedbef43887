"""How much of a noise tensors hold already: w on the noise by least squares, since noise can be drawn anew.

Wherever the noise came from: from this process, a copy of its model, or the checkpoint; and whatever was trained since.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from surgery.kernels import tensors as kernels
from surgery.live.targets import LiveTensor
from surgery.live.zero3 import size_of, whole
from surgery.noise import UNIT_STD, key
from surgery.noisytune import NoisyTune

_ERROR = 0.05
"""The largest standard error of a share that tells anything."""
_MOST = 1 << 25
"""Elements to look at."""


def measure_share(
    targets: Sequence[LiveTensor], settings: NoisyTune, pooled: float | None, workers: ThreadPoolExecutor
) -> float | None:
    """Return the share of a noise that is in tensors: about 0 if none of it is, and 1 if all of it is, once.

    With w = x + share * noise and x as random as weights are, the share of n elements has the standard error
    1 / (lam * sqrt(n / 12)): 213,000 tell for lam = 0.15.

    Args:
        targets: measured; to be perturbed.
        pooled: the std of scale="global".
    Returns:
        None if there are too few elements to tell, or lam is so small that too many would have to be looked at.
    """
    if not settings.lam:
        return None
    wanted = min(_MOST, 2 / (_ERROR * settings.lam * UNIT_STD) ** 2)
    along = length = 0.0
    by_size = sorted(targets, key=lambda target: size_of(target.tensor))
    for i, target in enumerate(by_size):
        assert target.moments is not None
        std = target.moments.std
        with whole(target.tensor) as values:
            w = values.detach().reshape(-1)[: math.ceil(wanted / (len(by_size) - i))].to(torch.float32)
        wanted = max(0.0, wanted - w.numel())
        noise = torch.zeros_like(w)
        kernels.add_noise(
            noise,
            "F32",
            workers,
            key=key(settings.seed, target.drawn_for or target.name),
            scale=settings.noise_scale(pooled or std, "F32"),
            is_normal=settings.noise == "normal",
            is_stochastic=False,
        )
        x, u = (w - target.moments.mean) / std, noise / std
        along += float(x @ u)
        length += float(u @ u)
    return along / length if length * _ERROR**2 >= 1 else None
