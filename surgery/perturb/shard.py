"""One shard of a checkpoint, streamed: read a piece, hash it, measure or perturb it, hash the result, hand it on.

Pieces may be worked on in any order and at once, since noise is a function of position; only the two digests and the
order in which a file is handed over want them in file order, and a `Sequencer` sees to each. A tensor of several
pieces is passed over twice: for its std, and for the noise. Its first pieces stay in memory meanwhile, the others are
read again. Small tensors that follow one another share a piece.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, zip_longest
from typing import Protocol

import numpy as np

from surgery.checkpoint.digests import new_digest
from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile, read_runs
from surgery.kernels import cpu
from surgery.noise import BLOCK, key
from surgery.noisytune import Effect, Moments, NoisyTune, merge_blocks, merge_effect
from surgery.perturb.partfile import new_window, place_in
from surgery.perturb.pieces import PIECE, PerturbedTensor, Piece, Run
from surgery.perturb.sequencer import Sequencer, StoppedError


class Sink(Protocol):
    """What a shard is handed to, from front to back: a PartFile that writes it, or a FileComparison.

    `take` is called in the order of the bytes, and says what to do with them before their window is used again.
    """

    def take(self, position: int, window: memoryview, nbytes: int) -> Callable[[], None]: ...
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
        source_version: what the store calls the source's object.
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
    source_version: str | None = None
    sink: Sink | None = None
    moments: dict[str, Moments] = field(default_factory=dict)
    effects: dict[str, Effect] = field(default_factory=dict)
    source_digest: str = ""
    digest: str = ""


class OpenShard:
    """A task under way: its open files, digests and turnstiles, and what is done with each of its pieces."""

    def __init__(self, task: ShardTask, settings: NoisyTune, held: int, stop: threading.Event) -> None:
        self.task = task
        self._held = held
        self.left = 0
        self.lock = threading.Lock()
        self._settings = settings
        self._stop = stop
        self._read_digest, self._written_digest = new_digest(task.source_algorithm), new_digest(task.algorithm)
        self._read_turns, self._write_turns = Sequencer(stop), Sequencer(stop)
        self._source = task.open_source()
        self._header = self._source.header
        self._read_numbers, self._write_numbers = count(), count()
        task.source_digest = task.source_digest or self._source.digest(task.source_algorithm) or ""
        self._hashes_reads = not task.source_digest
        if self._hashes_reads:
            self._read_digest.update(self._header.raw)
        if task.open_sink:
            task.sink = task.open_sink()
            self._hand_over_header(task.sink)

    def _hand_over_header(self, sink: Sink) -> None:
        raw = self._header.raw
        self._written_digest.update(raw)
        window = new_window(len(raw))
        place_in(window, 0, len(raw))[:] = raw
        sink.take(0, window, len(raw))()

    def pieces(self) -> list[Piece]:
        """List the work in an order in which no piece waits for a later one.

        While one large tensor is written the next is measured: two threads that both wait for the same digest would
        leave a core idle.
        """
        plan: list[Piece] = []
        second_pass: list[Piece] = []
        writes, measures = self.task.open_sink is not None, self.task.pooled_std is None
        for runs in self._batches():
            is_large = runs[0].nbytes < runs[0].tensor.nbytes
            if is_large and runs[0].state and measures and writes:
                measured = [self._piece([run], reads=True, writes=False) for run in runs]
                plan += [piece for pair in zip_longest(measured, second_pass) for piece in pair if piece]
                second_pass = [self._piece([run], reads=False, writes=True) for run in runs]
                for piece, heir in zip(measured[: self._held], second_pass, strict=False):
                    piece.heir, heir.is_heir = heir, True
            else:
                batches = [[run] for run in runs] if is_large else [runs]
                plan += second_pass + [self._piece(batch, reads=True, writes=writes) for batch in batches]
                second_pass = []
        plan += second_pass
        self.left = len(plan)
        return plan

    def _batches(self) -> Iterator[list[Run]]:
        """Yield the runs of each tensor that is larger than a piece, and of smaller ones as many as one holds."""
        small: list[Run] = []
        nbytes = 0
        for tensor in self._header.tensors:
            runs = self._runs(tensor)
            nbytes += tensor.nbytes
            if small and nbytes > PIECE:
                yield small
                small, nbytes = [], tensor.nbytes
            if len(runs) > 1:
                yield runs
                nbytes = 0
            else:
                small += runs
        if small:
            yield small

    def _runs(self, tensor: Tensor) -> list[Run]:
        """Cut a tensor; into nothing where there is nothing to be done with it."""
        starts, state = range(0, tensor.nbytes, PIECE), None
        if tensor.name not in self.task.copied:
            state = PerturbedTensor(len(starts), self.task.pooled_std)
        is_measured = state is not None and self.task.pooled_std is None
        if not (self.task.open_sink or is_measured or self._hashes_reads):
            return []
        sizes = (min(PIECE, tensor.nbytes - start) for start in starts)
        return [Run(tensor, state, *run) for run in zip(count(), starts, sizes, strict=False)]

    def _piece(self, runs: list[Run], *, reads: bool, writes: bool) -> Piece:
        """Make a piece; `reads` says whether it is the first to read its bytes."""
        return Piece(
            runs=tuple(runs),
            nbytes=sum(run.nbytes for run in runs),
            is_measured=reads and self.task.pooled_std is None,
            read_turn=next(self._read_numbers) if reads and self._hashes_reads else None,
            write_turn=next(self._write_numbers) if writes else None,
        )

    def take_over(self, heir: Piece) -> memoryview:
        """Wait until all of a tensor has been measured; return the window with what its heir is to write."""
        state = heir.runs[0].state
        assert state is not None
        self._await_std(state)
        assert heir.window is not None
        return heir.window

    def process(self, piece: Piece, window: memoryview) -> None:
        """Do one piece's work; `window`, of partfile.new_window(PIECE), holds it meanwhile."""
        position = piece.runs[0].position
        data = place_in(window, position, piece.nbytes)
        parts = list(self._parts(piece, data))
        if not piece.is_heir:
            read_runs(self._source, [(run.tensor, run.start, part) for run, part in parts], data)
        if piece.read_turn is not None:
            with self._read_turns.turn(piece.read_turn):
                self._read_digest.update(data)
        if piece.is_measured:
            for run, part in parts:
                if run.state:
                    self._measure(run, run.state, part)
        if piece.write_turn is None:
            return
        for run, part in parts:
            if run.state:
                self._perturb(run, run.state, part)
        assert self.task.sink is not None
        with self._write_turns.turn(piece.write_turn):
            self._written_digest.update(data)
            hand_over = self.task.sink.take(position, window, piece.nbytes)
        hand_over()

    def _parts(self, piece: Piece, data: memoryview) -> Iterator[tuple[Run, memoryview]]:
        start = 0
        for run in piece.runs:
            yield run, data[start : start + run.nbytes]
            start += run.nbytes

    def _measure(self, run: Run, state: PerturbedTensor, data: memoryview) -> None:
        tensor = run.tensor
        w = np.frombuffer(data, cpu.STORAGE[tensor.dtype])
        with state.lock:
            if state.shift is None:
                state.shift = cpu.to_float(w[:1], tensor.dtype) if run.start == 0 else self._first_element(tensor)
        sums = cpu.moments(w, tensor.dtype, state.shift)
        with state.lock:
            state.moments[run.index] = sums
            if len(state.moments) < state.pieces:
                return
        blocks = np.concatenate([state.moments[i] for i in range(state.pieces)])
        moments = merge_blocks(blocks, tensor.size, state.shift, what=self._name(tensor))
        self.task.moments[tensor.name] = moments
        state.moments.clear()
        state.std = moments.std
        state.is_settled.set()

    def _perturb(self, run: Run, state: PerturbedTensor, data: memoryview) -> None:
        self._await_std(state)
        if not state.std:
            return
        tensor = run.tensor
        w = np.frombuffer(data, cpu.STORAGE[tensor.dtype])
        sums = cpu.add_noise(
            w,
            tensor.dtype,
            first_block=run.start // w.itemsize // BLOCK,
            key=key(self._settings.seed, self.task.tied.get(tensor.name, tensor.name)),
            scale=self._settings.noise_scale(state.std, tensor.dtype),
            is_normal=self._settings.noise == "normal",
            is_stochastic=self._settings.rounding == "stochastic",
        )
        with state.lock:
            state.effects[run.index] = sums
            if len(state.effects) < state.pieces:
                return
        blocks = np.concatenate([state.effects[i] for i in range(state.pieces)])
        self.task.effects[tensor.name] = merge_effect(blocks, tensor.size, state.std, what=self._name(tensor))
        state.effects.clear()

    def _await_std(self, state: PerturbedTensor) -> None:
        while not state.is_settled.wait(0.1):
            if self._stop.is_set():
                raise StoppedError

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
