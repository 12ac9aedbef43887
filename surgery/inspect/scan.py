"""Read tensors a piece at a time in a few threads, alone or in pairs, so that no whole tensor is ever in memory."""

import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile
from surgery.dtypes import BITS
from surgery.noise import BLOCK

_PIECE = 4 << 20  # bytes: enough that a call costs nothing beside the work
_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


class Run:
    """A run of a tensor's elements, to be read once or not at all.

    Args:
        source, tensor: the tensor and the file it is in.
        first, elements: where the run begins, and how many elements it has.
        buffer: with room for it.
    """

    def __init__(self, source: WeightFile, tensor: Tensor, first: int, elements: int, buffer: memoryview) -> None:
        self.tensor = tensor
        self.elements = elements
        self._source = source
        self._start = first * BITS[tensor.dtype] // 8
        self._buffer = buffer[: elements * BITS[tensor.dtype] // 8]

    @property
    def nbytes(self) -> int:
        return len(self._buffer)

    @contextmanager
    def place(self) -> Iterator[tuple[int, int] | None]:
        """Keep a file open; say its descriptor, and where the run's bytes begin; None where that is not so simple."""
        descriptor = self._source.descriptor
        if descriptor is None:
            yield None
            return
        with descriptor.use() as fd:
            yield fd, self.tensor.begin + self._start

    def read(self) -> memoryview:
        """Read the run's bytes, and return them."""
        self._source.read_into(self.tensor, self._start, self._buffer)
        return self._buffer


@dataclass
class Measurement(Generic[_Part, _Result]):
    """One tensor to measure, or several of one shape together.

    Args:
        readers: each tensor and the file it is in.
        measure: takes the same run of elements of each; is called in any thread and in any order.
        merge: takes what `measure` returned, in the order of the elements.
    """

    readers: "Sequence[tuple[WeightFile, Tensor]]"
    measure: Callable[[list[Run]], _Part]
    merge: Callable[[list[_Part]], _Result]
    parts: dict[int, _Part] = field(default_factory=dict)
    result: _Result | None = None


def scan(measurements: Iterable[Measurement[Any, Any]], *, workers: int, on_bytes: Callable[[int], object]) -> None:
    """Set the result of every measurement. The first error of any thread stops all of them and is raised.

    Args:
        workers: threads.
        on_bytes: called with the bytes that have been read, as they are.
    """
    pieces, lock, stop = _pieces(measurements), threading.Lock(), threading.Event()

    def next_piece() -> "_Piece | None":
        with lock:
            return None if stop.is_set() else next(pieces, None)

    def work() -> None:
        buffers: list[memoryview] = []
        try:
            while piece := next_piece():
                buffers += [memoryview(mmap.mmap(-1, _PIECE)) for _ in piece.measurement.readers[len(buffers) :]]
                on_bytes(_process(piece, buffers, lock))
        finally:
            stop.set()

    with ThreadPoolExecutor(workers, thread_name_prefix="surgery") as pool:
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            wait(futures)
        finally:
            stop.set()
    for future in futures:
        future.result()


@dataclass(frozen=True)
class _Piece:
    """A run of elements of a measurement's tensors, in bytes of the widest of their dtypes."""

    measurement: Measurement[Any, Any]
    index: int
    count: int
    first: int
    elements: int


def _pieces(measurements: Iterable[Measurement[Any, Any]]) -> Iterator[_Piece]:
    for measurement in measurements:
        tensor = measurement.readers[0][1]
        bits = max(BITS[tensor.dtype] for _, tensor in measurement.readers)
        step = _PIECE * 8 // bits // BLOCK * BLOCK
        starts = range(0, tensor.size, step)
        if not starts:
            measurement.result = measurement.merge([])
        for index, first in enumerate(starts):
            yield _Piece(measurement, index, len(starts), first, min(step, tensor.size - first))


def _process(piece: _Piece, buffers: list[memoryview], lock: threading.Lock) -> int:
    """Read and measure one piece; the last of a measurement merges them all. Returns the bytes read."""
    measurement = piece.measurement
    readers = zip(measurement.readers, buffers, strict=False)
    runs = [Run(*reader, piece.first, piece.elements, buffer) for reader, buffer in readers]
    part = measurement.measure(runs)
    with lock:
        measurement.parts[piece.index] = part
        is_last = len(measurement.parts) == piece.count
    if is_last:
        measurement.result = measurement.merge([measurement.parts[index] for index in range(piece.count)])
        measurement.parts.clear()
    return sum(run.nbytes for run in runs)
