"""One shard of a checkpoint, streamed: read a piece, hash it, measure or perturb it, hash the result, hand it on.

Pieces may be worked on in any order and at once, since noise is a function of position; only the two digests and
the disk want them in file order, and a `_Sequencer` sees to each. A tensor of several pieces is read twice: once for
its std, once for the noise.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, zip_longest
from typing import Protocol

import numpy as np

from surgery.checkpoint.digests import new_digest
from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile
from surgery.kernels import cpu
from surgery.noise import BLOCK, key
from surgery.noisytune import Effect, Moments, NoisyTune, merge_blocks, merge_effect

# Bytes at a time: small enough for a core's cache, whole blocks of the noise contract in every dtype.
PIECE = 2 << 20


class Sink(Protocol):
    """What a shard is handed to, from front to back: a PartFile that writes it, or a FileComparison."""

    def append(self, data: memoryview) -> None: ...
    def close(self) -> None: ...


@dataclass
class ShardTask:
    """One shard's work, and its results once `run` hands it to `on_done`.

    Args:
        name: the shard's name in the output.
        label: the shard's name in errors.
        open_source: opens the shard to read.
        open_sink: opens what the shard is handed to, which on_done finishes; None: measure only.
        copied: names of the tensors to copy unchanged.
        tied: names of tensors that get the noise of another, and that one's name.
        pooled_std: if given, the std that scales every tensor's noise, none of which is then measured.
        algorithm: of the digest of what is handed on.
        source_algorithm: of the source's digest.
        source_digest: the source's digest, if it is known already.
    """

    name: str
    label: str
    open_source: Callable[[], WeightFile]
    open_sink: Callable[[], Sink] | None
    copied: frozenset[str]
    algorithm: str
    source_algorithm: str
    tied: Mapping[str, str] = field(default_factory=dict)
    pooled_std: float | None = None
    sink: Sink | None = None
    moments: dict[str, Moments] = field(default_factory=dict)
    effects: dict[str, Effect] = field(default_factory=dict)
    source_digest: str = ""
    digest: str = ""


class StoppedError(Exception):
    """Another thread failed, or the user interrupted the run."""


class _Sequencer:
    """Lets numbered pieces through one at a time, in order."""

    def __init__(self, stop: threading.Event) -> None:
        self._condition = threading.Condition()
        self._next = 0
        self._stop = stop

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        with self._condition:
            while self._next != number:
                if self._stop.is_set():
                    raise StoppedError
                self._condition.wait(0.1)
        yield
        with self._condition:
            self._next += 1
            self._condition.notify_all()


class _PerturbedTensor:
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
class Piece:
    """A run of one tensor's bytes, and what is to be done with it."""

    shard: "OpenShard"
    tensor: Tensor
    state: _PerturbedTensor | None
    index: int
    start: int
    nbytes: int
    is_measured: bool
    read_turn: int | None
    write_turn: int | None


class OpenShard:
    """A task under way: its open files, digests and turnstiles, and what is done with each of its pieces."""

    def __init__(self, task: ShardTask, settings: NoisyTune, stop: threading.Event) -> None:
        self.task = task
        self.left = 0
        self.lock = threading.Lock()
        self._settings = settings
        self._stop = stop
        self._read_digest, self._written_digest = new_digest(task.source_algorithm), new_digest(task.algorithm)
        self._read_turns, self._hash_turns, self._write_turns = _Sequencer(stop), _Sequencer(stop), _Sequencer(stop)
        self._source = task.open_source()
        self._header = self._source.header
        self._read_numbers, self._write_numbers = count(), count()
        task.source_digest = task.source_digest or self._source.digest(task.source_algorithm) or ""
        self._hashes_reads = not task.source_digest
        self._read_digest.update(self._header.raw)
        self._written_digest.update(self._header.raw)
        if task.open_sink:
            task.sink = task.open_sink()
            task.sink.append(memoryview(self._header.raw))

    def pieces(self) -> list[Piece]:
        """List the work in an order in which no piece waits for a later one.

        While one large tensor is written the next is measured: two threads that both wait for the same digest would
        leave a core idle.
        """
        plan: list[Piece] = []
        second_pass: list[Piece] = []
        for tensor in self._header.tensors:
            starts = range(0, tensor.nbytes, PIECE)
            state = None
            if tensor.name not in self.task.copied:
                state = _PerturbedTensor(len(starts), self.task.pooled_std)
            measures = state is not None and self.task.pooled_std is None
            writes = self.task.open_sink is not None
            cut = partial(self._cut, tensor, state, starts)
            if measures and writes and len(starts) > 1:
                measured = cut(reads=True, measures=True, writes=False)
                plan += [piece for pair in zip_longest(measured, second_pass) for piece in pair if piece]
                second_pass = cut(reads=False, measures=False, writes=True)
            elif writes or measures or self._hashes_reads:
                plan += second_pass + cut(reads=True, measures=measures, writes=writes)
                second_pass = []
        plan += second_pass
        self.left = len(plan)
        return plan

    def _cut(
        self,
        tensor: Tensor,
        state: _PerturbedTensor | None,
        starts: range,
        *,
        reads: bool,
        measures: bool,
        writes: bool,
    ) -> list[Piece]:
        """Cut one pass over a tensor into pieces; `reads` says whether it is the first."""
        pieces = []
        for index, start in enumerate(starts):
            read_turn = next(self._read_numbers) if reads and self._hashes_reads else None
            write_turn = next(self._write_numbers) if writes else None
            nbytes = min(PIECE, tensor.nbytes - start)
            pieces.append(Piece(self, tensor, state, index, start, nbytes, measures, read_turn, write_turn))
        return pieces

    def process(self, piece: Piece, buffer: memoryview) -> None:
        """Do one piece's work; `buffer` holds it meanwhile."""
        data = buffer[: piece.nbytes]
        self._source.read_into(piece.tensor, piece.start, data)
        if piece.read_turn is not None:
            with self._read_turns.turn(piece.read_turn):
                self._read_digest.update(data)
        if piece.is_measured:
            self._measure(piece, data)
        if piece.write_turn is not None:
            if piece.state:
                self._perturb(piece, piece.state, data)
            with self._hash_turns.turn(piece.write_turn):
                self._written_digest.update(data)
            assert self.task.sink is not None
            with self._write_turns.turn(piece.write_turn):
                self.task.sink.append(data)

    def _measure(self, piece: Piece, data: memoryview) -> None:
        state = piece.state
        assert state is not None
        w = np.frombuffer(data, cpu.STORAGE[piece.tensor.dtype])
        with state.lock:
            if state.shift is None:
                state.shift = self._first_element(piece.tensor)
        sums = cpu.moments(w, piece.tensor.dtype, state.shift)
        with state.lock:
            state.moments[piece.index] = sums
            if len(state.moments) < state.pieces:
                return
        blocks = np.concatenate([state.moments[i] for i in range(state.pieces)])
        moments = merge_blocks(blocks, piece.tensor.size, state.shift, what=self._name(piece.tensor))
        self.task.moments[piece.tensor.name] = moments
        state.moments.clear()
        state.std = moments.std
        state.is_settled.set()

    def _perturb(self, piece: Piece, state: _PerturbedTensor, data: memoryview) -> None:
        while not state.is_settled.wait(0.1):
            if self._stop.is_set():
                raise StoppedError
        if not state.std:
            return
        tensor = piece.tensor
        w = np.frombuffer(data, cpu.STORAGE[tensor.dtype])
        sums = cpu.add_noise(
            w,
            tensor.dtype,
            first_block=piece.start // w.itemsize // BLOCK,
            key=key(self._settings.seed, self.task.tied.get(tensor.name, tensor.name)),
            scale=self._settings.noise_scale(state.std, tensor.dtype),
            is_normal=self._settings.noise == "normal",
            is_stochastic=self._settings.rounding == "stochastic",
        )
        with state.lock:
            state.effects[piece.index] = sums
            if len(state.effects) < state.pieces:
                return
        blocks = np.concatenate([state.effects[i] for i in range(state.pieces)])
        self.task.effects[tensor.name] = merge_effect(blocks, tensor.size, state.std, what=self._name(tensor))
        state.effects.clear()

    def _first_element(self, tensor: Tensor) -> float:
        w = np.empty(1, cpu.STORAGE[tensor.dtype])
        self._source.read_into(tensor, 0, w.view(np.uint8).data)
        return cpu.to_float(w, tensor.dtype)

    def _name(self, tensor: Tensor) -> str:
        return f"{self.task.label}: {tensor.name!r}"

    def finish(self) -> None:
        """Settle the digests and release the source."""
        if self._hashes_reads:
            self.task.source_digest = self._read_digest.text()
        self._source.settle(self.task.source_digest)
        self.task.digest = self._written_digest.text()
        self._source.close()

    def abandon(self) -> None:
        """Release the files of a shard that will not be finished."""
        self._source.close()
        if self.task.sink:
            self.task.sink.close()
