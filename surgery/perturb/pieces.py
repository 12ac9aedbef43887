"""What a shard is cut into: runs of tensors' bytes, and the pieces of a file that they make up."""

import threading
from dataclasses import dataclass

import numpy as np

from surgery.checkpoint.tensorfile import Tensor

PIECE = 4 << 20
"""Bytes at a time: whole blocks of the noise contract in every dtype, and enough for the disk."""


class PerturbedTensor:
    """A tensor that gets noise: its pieces' block sums come in, and the last of them settles its std."""

    def __init__(self, pieces: int, std: float | None) -> None:
        self.moments: dict[int, np.ndarray] = {}
        self.effects: dict[int, np.ndarray] = {}
        self.pieces = pieces
        self.std = std
        self.shift: float | None = None
        self.is_settled = threading.Event()
        self.lock = threading.Lock()
        if std is not None:
            self.is_settled.set()


@dataclass(frozen=True)
class Run:
    """A run of one tensor's bytes, the whole of it or one of several; `state` is that of a tensor that gets noise."""

    tensor: Tensor
    state: PerturbedTensor | None
    index: int
    start: int
    nbytes: int

    @property
    def position(self) -> int:
        """Where in the file it begins."""
        return self.tensor.begin + self.start


@dataclass(eq=False)
class Piece:
    """Runs that follow one another in a file, and what is to be done with them.

    Args:
        heir: the piece that writes what this one has read, from the window in which it is.
        window: that of such an heir, once the other piece has it.
        is_heir: there is nothing to be read any more.
    """

    runs: tuple[Run, ...]
    nbytes: int
    is_measured: bool
    read_turn: int | None
    write_turn: int | None
    is_heir: bool = False
    heir: "Piece | None" = None
    window: memoryview | None = None
