"""Sample up to 8 blocks of a tensor, at places that depend on its size alone, so that two copies can be compared."""

import numpy as np

from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile
from surgery.dtypes import BITS, storage, to_numbers
from surgery.noise import BLOCK
from surgery.noisytune import FLOATS

_BLOCKS = 8


def sample(source: WeightFile, tensor: Tensor) -> np.ndarray:
    """Read up to 8 blocks of 4096 elements, spread evenly over a tensor.

    Args:
        source: the open file that holds it.
        tensor: of a floating-point dtype that can be perturbed.
    Returns:
        The elements, float64, shape (n,).
    """
    assert tensor.dtype in FLOATS
    blocks = -(-tensor.size // BLOCK)
    chosen = sorted({blocks * i // _BLOCKS for i in range(_BLOCKS)}) if blocks else []
    return np.concatenate([np.empty(0), *(_read(source, tensor, block) for block in chosen)])


def _read(source: WeightFile, tensor: Tensor, block: int) -> np.ndarray:
    width = BITS[tensor.dtype] // 8
    count = min(BLOCK, tensor.size - block * BLOCK)
    data = bytearray(count * width)
    source.read_into(tensor, block * BLOCK * width, memoryview(data))
    return to_numbers(storage(memoryview(data), tensor.dtype), tensor.dtype)[0].astype(np.float64)
