"""The threads that stream shards: each holds one piece at a time, whatever the size of a tensor or a checkpoint."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from surgery.noisytune import NoisyTune
from surgery.perturb.partfile import new_window
from surgery.perturb.sequencer import StoppedError
from surgery.perturb.shard import PIECE, OpenShard, Piece, ShardTask


def run(
    tasks: Iterable[ShardTask],
    settings: NoisyTune,
    *,
    workers: int,
    on_done: Callable[[ShardTask], None],
    on_bytes: Callable[[int], object],
) -> None:
    """Do all tasks with `workers` threads; call `on_done` from a worker as each task ends, `on_bytes` as bytes pass.

    A shard is bound by its sequential digests, so there are two threads to a shard and as many shards at once as that
    allows. The first error of any thread stops all of them and is raised; so is KeyboardInterrupt.
    """
    shared = _Shared(tasks, settings, workers, on_done, on_bytes)
    threads: list[threading.Thread] = []
    try:
        for i in range(workers):
            thread = threading.Thread(target=shared.work, args=(i,), daemon=True, name=f"surgery-{i}")
            thread.start()
            threads.append(thread)
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
        self._lanes = [_ShardQueue(self) for _ in range(max(1, workers // 2))]

    def next_task(self) -> ShardTask | None:
        with self._lock:
            return next(self._tasks, None)

    def start(self, task: ShardTask) -> OpenShard:
        shard = OpenShard(task, self._settings, self.stop)
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

    def _next_piece(self, number: int) -> Piece | None:
        """Take a piece of the thread's own lane, or help out in another when there is none left."""
        n = len(self._lanes)
        lanes = (self._lanes[(number + i) % n] for i in range(n))
        return next((piece for lane in lanes if (piece := lane.next_piece())), None)

    def work(self, number: int) -> None:
        """Take pieces until there are none left. The body of every thread."""
        window = new_window(PIECE)
        try:
            while not self.stop.is_set() and (piece := self._next_piece(number)):
                piece.shard.process(piece, window)
                if piece.write_turn is not None or not piece.shard.task.open_sink:
                    self._on_bytes(piece.nbytes)
                with piece.shard.lock:
                    piece.shard.left -= 1
                    is_last = piece.shard.left == 0
                if is_last:
                    self.close(piece.shard)
        except StoppedError:
            pass
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self.stop.set()


class _ShardQueue:
    """The pieces of one shard after another, for the threads that share them."""

    def __init__(self, shared: _Shared) -> None:
        self._lock = threading.Lock()
        self._pieces = self._all(shared)

    def _all(self, shared: _Shared) -> Iterator[Piece]:
        while task := shared.next_task():
            shard = shared.start(task)
            pieces = shard.pieces()
            if not pieces:
                shared.close(shard)
            yield from pieces

    def next_piece(self) -> Piece | None:
        with self._lock:
            return next(self._pieces, None)
