"""Measure tensors, alone or in pairs, a piece at a time with a few threads, which is all that is in memory."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from surgery.checkpoint.tensorfile import BITS, Tensor
from surgery.noise import BLOCK

if TYPE_CHECKING:
    from surgery.perturb.shard import Source

_PIECE = 2 << 20  # bytes: enough that a call costs nothing beside the work
_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


@dataclass
class Job(Generic[_Part, _Result]):
    """One tensor to measure, or several of one shape together.

    Args:
        readers: each tensor and the file it is in.
        measure: takes the same run of elements of each, as bytes; runs in any thread and in any order.
        merge: takes what `measure` returned, in the order of the elements.
    """

    readers: "Sequence[tuple[Source, Tensor]]"
    measure: Callable[[list[memoryview]], _Part]
    merge: Callable[[list[_Part]], _Result]
    parts: dict[int, _Part] = field(default_factory=dict)
    result: _Result | None = None


def scan(jobs: Iterable[Job[Any, Any]], *, workers: int, on_bytes: Callable[[int], object]) -> None:
    """Set the result of every job. The first error of any thread stops all of them and is raised.

    Args:
        workers: threads.
        on_bytes: called with the bytes that have been read, as they are.
    """
    pieces, lock, stop = _pieces(jobs), threading.Lock(), threading.Event()

    def next_piece() -> "_Piece | None":
        with lock:
            return None if stop.is_set() else next(pieces, None)

    def work() -> None:
        buffers: list[memoryview] = []
        try:
            while piece := next_piece():
                buffers += [memoryview(bytearray(_PIECE)) for _ in piece.job.readers[len(buffers) :]]
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
    """A run of elements of a job's tensors, in bytes of the widest of their dtypes."""

    job: Job[Any, Any]
    index: int
    count: int
    first: int
    elements: int


def _pieces(jobs: Iterable[Job[Any, Any]]) -> Iterator[_Piece]:
    for job in jobs:
        tensor = job.readers[0][1]
        bits = max(BITS[tensor.dtype] for _, tensor in job.readers)
        step = _PIECE * 8 // bits // BLOCK * BLOCK
        starts = range(0, tensor.size, step)
        if not starts:
            job.result = job.merge([])
        for index, first in enumerate(starts):
            yield _Piece(job, index, len(starts), first, min(step, tensor.size - first))


def _process(piece: _Piece, buffers: list[memoryview], lock: threading.Lock) -> int:
    """Read and measure one piece; the last of a job merges them all. Returns the bytes read."""
    job, data = piece.job, []
    for (source, tensor), buffer in zip(job.readers, buffers, strict=False):
        bits = BITS[tensor.dtype]
        data.append(buffer[: piece.elements * bits // 8])
        source.read_into(tensor, piece.first * bits // 8, data[-1])
    part = job.measure(data)
    with lock:
        job.parts[piece.index] = part
        is_last = len(job.parts) == piece.count
    if is_last:
        job.result = job.merge([job.parts[index] for index in range(piece.count)])
        job.parts.clear()
    return sum(map(len, data))
