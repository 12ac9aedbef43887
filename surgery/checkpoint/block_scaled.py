"""Weights in blocks of small floats with a scale each, as bfloat16: float8 (DeepSeek, Qwen) and mxfp4 (gpt-oss).

float8: w = q * s, s of the block that the element is in, in float32 (DeepSeek-V3, arXiv 2412.19437, 3.3).
mxfp4: two E2M1 values a byte, the lower bits first; 32 of a row share a scale of 2^(s - 127) (OCP Microscaling Formats
1.0, 5.3 and 6). gpt-oss stores rows of outputs, and its layers have inputs first: the last two dimensions
change places.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgery.checkpoint.tensorfile import Tensor
from surgery.errors import SourceError

ReadBytes = Callable[[int, int], torch.Tensor]
"""Returns so many bytes of a stored tensor, from one on, as uint8."""
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_PAIRS = torch.tensor([(_FP4[byte % 16], _FP4[byte // 16]) for byte in range(256)], dtype=torch.bfloat16)
_PER_SCALE = 32


@dataclass(frozen=True)
class Float8Blocks:
    """A matrix, or a stack of them, of float8.

    Args:
        stored: the tensor, of shape (..., rows, columns).
        read: reads its bytes.
        scales: float32 (..., block rows, block columns).
        block: rows and columns of a block.
    """

    stored: Tensor
    read: ReadBytes
    scales: torch.Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.stored.shape

    def values(self, first: int, count: int) -> torch.Tensor:
        """Return `count` elements from `first` on, in the order of the values, as bfloat16."""
        height, columns = self.shape[-2:]
        row, end = first // columns, -(-(first + count) // columns)
        q = self.read(row * columns, (end - row) * columns).view(FLOAT8[self.stored.dtype])
        rows = torch.arange(row, end)
        of_rows = self.scales.flatten(0, -3)[rows // height, rows % height // self.block[0]]
        scales = of_rows.repeat_interleave(self.block[1], 1)[:, :columns]
        values = (q.float().view(-1, columns) * scales).to(torch.bfloat16).flatten()
        return values[first - row * columns :][:count]


@dataclass(frozen=True)
class Mxfp4Blocks:
    """A stack of matrices in mxfp4.

    Args:
        stored: the tensor of blocks, U8 of shape (..., outputs, groups, 16).
        read, read_scales: read bytes of the blocks, and of the scales, U8 of shape (..., outputs, groups).
    """

    stored: Tensor
    read: ReadBytes
    read_scales: ReadBytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values: (..., inputs, outputs)."""
        *stack, outputs, groups, _ = self.stored.shape
        return (*stack, groups * _PER_SCALE, outputs)

    def values(self, first: int, count: int) -> torch.Tensor:
        """Return `count` elements from `first` on, in the order of the values, as bfloat16."""
        inputs, outputs = self.shape[-2:]
        size = inputs * outputs
        parts = []
        for matrix in range(first // size, -(-(first + count) // size)):
            begin, end = max(first - matrix * size, 0), min(first + count - matrix * size, size)
            row = begin // outputs
            parts.append(self._rows(matrix, row, -(-end // outputs)).flatten()[begin - row * outputs :][: end - begin])
        return torch.cat(parts)

    def _rows(self, matrix: int, row: int, end: int) -> torch.Tensor:
        """Return rows of one matrix of the values, which are columns of what is stored."""
        outputs, groups = self.stored.shape[-3:-1]
        n = outputs * groups
        wanted = slice(row // _PER_SCALE, -(-end // _PER_SCALE))
        codes = self.read(matrix * n * 16, n * 16).view(outputs, groups, 16)[:, wanted]
        exponents = self.read_scales(matrix * n, n).view(outputs, groups, 1)[:, wanted].float() - 127
        values = _PAIRS[codes.int()].flatten(2) * exponents.exp2().to(torch.bfloat16)
        first = row - wanted.start * _PER_SCALE
        return values.flatten(1).T[first : first + end - row]


def block_of(weight: Tensor, grid: tuple[int, ...], block: tuple[int, int] | None, label: str) -> tuple[int, int]:
    """Return rows and columns of the blocks of a float8 weight.

    Args:
        grid: shape of its scales.
        block: what the config says; where it does not fit, the scales must divide the weight evenly.
        label: the weight's name in errors.
    Raises:
        SourceError: the scales are of another weight.
    """
    rows, columns = weight.shape[-2:] if len(weight.shape) > 1 else (0, 0)
    if rows and math.prod(grid) == 1:
        return rows, columns
    if rows and len(grid) > 1 and grid[:-2] == weight.shape[:-2]:
        if block and grid[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
            return block
        if not rows % grid[-2] and not columns % grid[-1]:
            return rows // grid[-2], columns // grid[-1]
    raise SourceError(
        f"{label}: expected scales of blocks that make up {list(weight.shape)}, got {list(grid)}. "
        "Fetch the checkpoint again, with its config.json."
    )
