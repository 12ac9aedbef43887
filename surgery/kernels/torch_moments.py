"""The sums behind a tensor's std in plain torch, on any device, with the bits of `cpu`."""

import torch

from surgery.noise import BLOCK, LANES

_CHUNK = 1024 * BLOCK  # elements whose moments are taken at once: 32 MB of float64 for each temporary


def moments(w: torch.Tensor, shift: float) -> torch.Tensor:
    """Sum d = w - shift and d * d per block of the contract: cpu.moments, bit for bit.

    Elementwise torch operations in the contract's order; torch.sum has an order of its own.

    Args:
        w: flat, contiguous, on any device.
        shift: the tensor's first element.
    Returns:
        float64, shape (blocks, 2), on w's device.
    """
    return torch.cat([_chunk_moments(chunk, shift) for chunk in w.split(_CHUNK)])


def _chunk_moments(w: torch.Tensor, shift: float) -> torch.Tensor:
    d = w.to(torch.float64) - shift
    d = torch.nn.functional.pad(d, (0, -d.numel() % BLOCK)).view(-1, 4, LANES)
    squares = d * d
    return torch.stack([_fold(d), _fold(squares)], dim=1)


def _fold(rows: torch.Tensor) -> torch.Tensor:
    t = (rows[:, 0] + rows[:, 1]) + (rows[:, 2] + rows[:, 3])
    while t.shape[1] > 1:
        half = t.shape[1] // 2
        t = t[:, :half] + t[:, half:]
    return t[:, 0]
