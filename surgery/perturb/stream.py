"""The threads that stream shards, a piece at a time: memory does not grow with a tensor or a checkpoint."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, LifoQueue

from surgery.noisytune import NoisyTune
from surgery.perturb.partfile import new_window
from surgery.perturb.pieces import PIECE, Piece
from surgery.perturb.sequencer import StoppedError
from surgery.perturb.shard import OpenShard, ShardTask

_PER_SHARD = 8
"""Threads at most; more would wait for the digest."""
_HELD = 6
"""Pieces of a tensor that stay in memory between its two passes: most matrices whole."""


def run(
    tasks: Iterable[ShardTask],
    settings: NoisyTune,
    *,
    workers: int,
    on_done: Callable[[ShardTask], None],
    on_bytes: Callable[[int], object],
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Do all tasks with `workers` threads; call `on_done` from a worker as each task ends, `on_bytes` as bytes pass.

    The digest of a shard is sequential, and keeps up with some threads; so many work on a shard, and as many shards are
    streamed at once as that allows. The first error of any thread stops all of them and is raised; so is
    KeyboardInterrupt.

    Args:
        meanwhile: is called once they are under way.
    """
    shared = _Shared(tasks, settings, workers, on_done, on_bytes)
    threads: list[threading.Thread] = []
    try:
        for i in range(workers):
            thread = threading.Thread(target=shared.work, args=(i,), daemon=True, name=f"surgery-{i}")
            thread.start()
            threads.append(thread)
        meanwhile()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # a join without a timeout would hold up Ctrl-C
    finally:
        shared.stop.set()
        deadline = time.monotonic() + 0.5
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in threads):
            shared.abandon()  # else a straggler would write to whatever file gets its descriptor next
    if shared.error:
        raise shared.error


class _Shared:
    """The threads' common state: the tasks to take, the first error, and the signal to stop."""

    def __init__(
        self,
        tasks: Iterable[ShardTask],
        settings: NoisyTune,
        workers: int,
        on_done: Callable[[ShardTask], None],
        on_bytes: Callable[[int], object],
    ) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._tasks = iter(tasks)
        self._settings = settings
        self._on_done = on_done
        self._on_bytes = on_bytes
        self._open: list[OpenShard] = []
        self._lock = threading.Lock()
        lanes = -(-workers // _PER_SHARD)
        self._held = _HELD // lanes
        self._lanes = [_ShardQueue(self) for _ in range(lanes)]
        # a shard may hold two tensors, one that is being measured and one that is being written
        self._windows: LifoQueue[memoryview] = LifoQueue()
        for _ in range(workers + 2 * lanes * self._held):
            self._windows.put(new_window(PIECE))  # takes memory when it is first used

    def next_task(self) -> ShardTask | None:
        with self._lock:
            return next(self._tasks, None)

    def start(self, task: ShardTask) -> OpenShard:
        shard = OpenShard(task, self._settings, self._held, self.stop)
        with self._lock:
            self._open.append(shard)
        return shard

    def close(self, shard: OpenShard) -> None:
        """Hand on a shard whose pieces are all done."""
        shard.finish()
        with self._lock:
            self._open.remove(shard)
        self._on_done(shard.task)

    def abandon(self) -> None:
        """Release the files of shards that were not finished."""
        for shard in self._open:
            shard.abandon()

    def _next_piece(self, number: int) -> tuple[OpenShard, Piece] | None:
        """Take a piece of the thread's own lane, or help out in another when there is none left."""
        n = len(self._lanes)
        lanes = (self._lanes[(number + i) % n] for i in range(n))
        return next((found for lane in lanes if (found := lane.next_piece())), None)

    def _free_window(self) -> memoryview:
        while not self.stop.is_set():
            with suppress(Empty):
                return self._windows.get(timeout=0.1)
        raise StoppedError

    def work(self, number: int) -> None:
        """Take pieces until there are none left. The body of every thread."""
        try:
            while not self.stop.is_set() and (found := self._next_piece(number)):
                self._do(*found)
        except StoppedError:
            pass
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self.stop.set()

    def _do(self, shard: OpenShard, piece: Piece) -> None:
        window = shard.take_over(piece) if piece.is_heir else self._free_window()
        if piece.heir:
            piece.heir.window = window
        shard.process(piece, window)
        if not piece.heir:
            self._windows.put(window)
        if piece.write_turn is not None or not shard.task.open_sink:
            self._on_bytes(piece.nbytes)
        with shard.lock:
            shard.left -= 1
            is_last = shard.left == 0
        if is_last:
            self.close(shard)


class _ShardQueue:
    """The pieces of one shard after another, for the threads that share them."""

    def __init__(self, shared: _Shared) -> None:
        self._lock = threading.Lock()
        self._pieces = self._all(shared)

    def _all(self, shared: _Shared) -> Iterator[tuple[OpenShard, Piece]]:
        while task := shared.next_task():
            shard = shared.start(task)
            pieces = shard.pieces()
            if not pieces:
                shared.close(shard)
            yield from ((shard, piece) for piece in pieces)

    def next_piece(self) -> tuple[OpenShard, Piece] | None:
        with self._lock:
            return next(self._pieces, None)
