"""Stream shards through memory, a few pieces at a time: read, hash, measure, add noise, hash again, write.

Several threads share the pieces of one shard. Noise is a function of position, so pieces may be computed in any order;
only the two sha256 digests and the disk want them in file order, and a `_Turnstile` sees to each. A tensor of several
pieces is read twice: once for its std, once for the noise. Memory is one piece per thread, whatever a tensor's size.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, zip_longest
from typing import Protocol

import numpy as np

from surgery.kernels import cpu
from surgery.noise import BLOCK, key
from surgery.noisytune import Effect, Moments, NoisyTune, merge_blocks, merge_effect
from surgery.partfile import PartFile
from surgery.tensorfile import Header, Tensor

# Bytes at a time: small enough for a core's cache, whole blocks of the noise contract in every dtype.
_PIECE = 2 << 20


class Source(Protocol):
    """What a shard is read from: a TensorFile or a PickleFile."""

    header: Header
    tied: dict[str, str]

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None: ...
    def sha256(self) -> str | None: ...
    def learn(self, sha256: str) -> None: ...
    def close(self) -> None: ...


@dataclass
class Task:
    """One shard's work, and its results once `run` hands it to `on_done`.

    Args:
        name: the shard's name in the output.
        label: the shard's name in errors.
        open_source: opens the shard to read.
        open_target: opens the file to write, which on_done finishes; None: measure only.
        copied: names of the tensors to copy unchanged.
        pooled_std: if given, the std that scales every tensor's noise, none of which is then measured.
    """

    name: str
    label: str
    open_source: Callable[[], Source]
    open_target: Callable[[], PartFile] | None
    copied: frozenset[str]
    pooled_std: float | None = None
    target: PartFile | None = None
    moments: dict[str, Moments] = field(default_factory=dict)
    effects: dict[str, Effect] = field(default_factory=dict)
    source_sha256: str = ""
    sha256: str = ""


def run(
    tasks: Iterable[Task],
    settings: NoisyTune,
    *,
    workers: int,
    on_done: Callable[[Task], None],
    on_bytes: Callable[[int], object],
) -> None:
    """Do all tasks with `workers` threads; call `on_done` from a worker as each task ends, `on_bytes` as bytes pass.

    A shard is bound by its sequential digests, so there are two threads to a shard and as many shards at once as that
    allows. The first error of any thread stops all of them and is raised; so is KeyboardInterrupt.
    """
    crew = _Crew(tasks, settings, on_done, on_bytes)
    lanes = [crew.lane() for _ in range(max(1, workers // 2))]
    threads = [
        threading.Thread(target=crew.work, args=(lanes[i % len(lanes)],), daemon=True, name=f"surgery-{i}")
        for i in range(workers)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # a join without a timeout would hold up Ctrl-C
    finally:
        crew.stop.set()
        deadline = time.monotonic() + 0.5
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in threads):
            crew.abandon()  # else a straggler would write to whatever file gets its descriptor next
    if crew.error:
        raise crew.error


class _StoppedError(Exception):
    """Another thread failed, or the user interrupted the run."""


class _Turnstile:
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
                    raise _StoppedError
                self._condition.wait(0.1)
        yield
        with self._condition:
            self._next += 1
            self._condition.notify_all()


class _Perturbed:
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
class _Piece:
    """A run of one tensor's bytes, and what is to be done with it."""

    shard: "_Shard"
    tensor: Tensor
    state: _Perturbed | None
    index: int
    start: int
    nbytes: int
    is_measured: bool
    read_turn: int | None
    write_turn: int | None


class _Shard:
    """A task under way: its open files, digests and turnstiles, and what is done with each of its pieces."""

    def __init__(self, task: Task, settings: NoisyTune, stop: threading.Event) -> None:
        self.task = task
        self.left = 0
        self.lock = threading.Lock()
        self._settings = settings
        self._stop = stop
        self._read_digest, self._written_digest = hashlib.sha256(), hashlib.sha256()
        self._read_turns, self._hash_turns, self._write_turns = _Turnstile(stop), _Turnstile(stop), _Turnstile(stop)
        self._source = task.open_source()
        self._header = self._source.header
        self._read_numbers, self._write_numbers = count(), count()
        self._is_second_pass = task.pooled_std is not None
        own_sha256 = None if self._is_second_pass else self._source.sha256()
        self._hashes_reads = own_sha256 is None and not self._is_second_pass
        task.source_sha256 = own_sha256 or ""
        self._read_digest.update(self._header.raw)
        self._written_digest.update(self._header.raw)
        if task.open_target:
            task.target = task.open_target()
            task.target.append(memoryview(self._header.raw))

    def pieces(self) -> list[_Piece]:
        """List the work in an order in which no piece waits for a later one.

        While one large tensor is written the next is measured: two threads that both wait for the same digest would
        leave a core idle.
        """
        plan: list[_Piece] = []
        second_pass: list[_Piece] = []
        for tensor in self._header.tensors:
            starts = range(0, tensor.nbytes, _PIECE)
            state = None
            if tensor.name not in self.task.copied:
                state = _Perturbed(len(starts), self.task.pooled_std)
            measures = state is not None and not self._is_second_pass
            writes = self.task.open_target is not None
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
        self, tensor: Tensor, state: "_Perturbed | None", starts: range, *, reads: bool, measures: bool, writes: bool
    ) -> list[_Piece]:
        """Cut one pass over a tensor into pieces; `reads` says whether it is the first."""
        pieces = []
        for index, start in enumerate(starts):
            read_turn = next(self._read_numbers) if reads and self._hashes_reads else None
            write_turn = next(self._write_numbers) if writes else None
            nbytes = min(_PIECE, tensor.nbytes - start)
            pieces.append(_Piece(self, tensor, state, index, start, nbytes, measures, read_turn, write_turn))
        return pieces

    def process(self, piece: _Piece, buffer: memoryview) -> None:
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
            assert self.task.target is not None
            with self._write_turns.turn(piece.write_turn):
                self.task.target.append(data)

    def _measure(self, piece: _Piece, data: memoryview) -> None:
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

    def _perturb(self, piece: _Piece, state: _Perturbed, data: memoryview) -> None:
        while not state.is_settled.wait(0.1):
            if self._stop.is_set():
                raise _StoppedError
        if not state.std:
            return
        tensor = piece.tensor
        sums = cpu.add_noise(
            np.frombuffer(data, cpu.STORAGE[tensor.dtype]),
            tensor.dtype,
            first_block=piece.start * 8 // _bits(tensor.dtype) // BLOCK,
            key=key(self._settings.seed, tensor.name),
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
            self.task.source_sha256 = self._read_digest.hexdigest()
            self._source.learn(self.task.source_sha256)
        self.task.sha256 = self._written_digest.hexdigest()
        self._source.close()

    def abandon(self) -> None:
        self._source.close()
        if self.task.target:
            self.task.target.close()


class _Crew:
    """The threads' common state: the tasks to take, the first error, and the signal to stop."""

    def __init__(
        self,
        tasks: Iterable[Task],
        settings: NoisyTune,
        on_done: Callable[[Task], None],
        on_bytes: Callable[[int], object],
    ) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._tasks = iter(tasks)
        self._settings = settings
        self._on_done = on_done
        self._on_bytes = on_bytes
        self._open: list[_Shard] = []
        self._lock = threading.Lock()

    def lane(self) -> "_Lane":
        return _Lane(self)

    def next_task(self) -> Task | None:
        with self._lock:
            return next(self._tasks, None)

    def start(self, task: Task) -> _Shard:
        shard = _Shard(task, self._settings, self.stop)
        with self._lock:
            self._open.append(shard)
        return shard

    def close(self, shard: _Shard) -> None:
        """Hand on a shard whose pieces are all done."""
        shard.finish()
        with self._lock:
            self._open.remove(shard)
        self._on_done(shard.task)

    def abandon(self) -> None:
        """Release the files of shards that were not finished."""
        for shard in self._open:
            shard.abandon()

    def work(self, lane: "_Lane") -> None:
        """Take pieces until there are none left. The body of every thread."""
        buffer = memoryview(bytearray(_PIECE))
        try:
            while not self.stop.is_set() and (piece := lane.next_piece()):
                piece.shard.process(piece, buffer)
                if piece.write_turn is not None or not piece.shard.task.open_target:
                    self._on_bytes(piece.nbytes)
                with piece.shard.lock:
                    piece.shard.left -= 1
                    is_last = piece.shard.left == 0
                if is_last:
                    self.close(piece.shard)
        except _StoppedError:
            pass
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self.stop.set()


class _Lane:
    """The pieces of one shard after another, for the threads that share them."""

    def __init__(self, crew: _Crew) -> None:
        self._lock = threading.Lock()
        self._pieces = self._all(crew)

    def _all(self, crew: _Crew) -> Iterator[_Piece]:
        while task := crew.next_task():
            shard = crew.start(task)
            pieces = shard.pieces()
            if not pieces:
                crew.close(shard)
            yield from pieces

    def next_piece(self) -> _Piece | None:
        with self._lock:
            return next(self._pieces, None)


def _bits(dtype: str) -> int:
    return np.dtype(cpu.STORAGE[dtype]).itemsize * 8
