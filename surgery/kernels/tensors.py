"""The kernels called on torch tensors: on the CPU in place, on CUDA with Triton, elsewhere by way of the CPU."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from surgery.kernels import cpu, torch_moments
from surgery.kernels.backends import has_triton
from surgery.noise import BLOCK
from surgery.threads import computing_workers

_PIECE = 64 * BLOCK  # elements to a task: 0.2 ms of work, so that a matrix of a base-sized model occupies some threads


def workers() -> ThreadPoolExecutor:
    """Make the threads that share the pieces of a tensor on the CPU; use it in `with`."""
    return ThreadPoolExecutor(computing_workers(), thread_name_prefix="surgery")


def flatten(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements in row-major order where a kernel can take them: a view if that is possible, else a copy."""
    flat = tensor.detach().contiguous().view(-1)
    return flat if flat.device.type == "cpu" or (flat.is_cuda and has_triton()) else flat.cpu()


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """View the memory of a contiguous tensor on the CPU: flat, float16 and bfloat16 as uint16.

    Tensor.numpy does the same, and no one may resize the storage from then on, as FSDP does.
    """
    memory: Any = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    memory.owner = tensor  # lives as long as what looks at it
    array: np.ndarray = np.frombuffer(memory, f"{'u' if tensor.element_size() == 2 else 'f'}{tensor.element_size()}")
    return array


def moments(tensor: torch.Tensor, dtype: str, pool: ThreadPoolExecutor) -> tuple[np.ndarray, float]:
    """Sum the contract's d and d * d per block; return the sums, shape (blocks, 2), and the first element."""
    w = flatten(tensor)
    shift = float(w[0])
    if w.is_cuda:
        return torch_moments.moments(w, shift).cpu().numpy(), shift
    pieces = _pieces(w)
    return np.concatenate(list(_map(pool, lambda piece: cpu.moments(piece, dtype, shift), pieces))), shift


def add_noise(tensor: torch.Tensor, dtype: str, pool: ThreadPoolExecutor, **how: Any) -> np.ndarray:
    """Add noise in place, whatever the tensor's device and strides; autograd does not see it.

    Args:
        how: key, scale, is_normal and is_stochastic, as cpu.add_noise takes them.
    Returns:
        The sums of cpu.add_noise, shape (blocks, 4).
    """
    w = flatten(tensor)
    if w.is_cuda:
        from surgery.kernels import gpu

        sums = gpu.add_noise(w, dtype, first_block=0, **how).cpu().numpy()
    else:
        step = _PIECE // BLOCK
        work = list(enumerate(_pieces(w)))
        parts = _map(pool, lambda job: cpu.add_noise(job[1], dtype, first_block=job[0] * step, **how), work)
        sums = np.concatenate(list(parts))
    if w.data_ptr() != tensor.data_ptr() or w.device != tensor.device:
        tensor.detach().copy_(w.view(tensor.shape))
    return sums


def _pieces(w: torch.Tensor) -> list[np.ndarray]:
    storage = as_array(w)
    return [storage[start : start + _PIECE] for start in range(0, storage.size, _PIECE)]


def _map(pool: ThreadPoolExecutor, function: Any, work: list[Any]) -> Any:
    return pool.map(function, work) if len(work) > 1 else map(function, work)
