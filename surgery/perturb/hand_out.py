"""Hand out shards to an engine as tasks, and again what is lost, until all of them are recorded.

What counts is the record of a shard. A task that ended without one is handed out again, in a folder of its own; one
that was only taken for lost does no harm.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from surgery.engines.engine import Engine, State
from surgery.engines.job import LOG, Result, write_whole
from surgery.errors import OutputError, some
from surgery.escapes import get_logger
from surgery.files import read_file
from surgery.perturb.run_task import KINDS
from surgery.perturb.shard_plan import ShardPlan
from surgery.perturb.task import Task
from surgery.progress import bar

_MOST, _LEAST, _FEW = 1 << 30, 1 << 27, 16
"""A task is one shard, or small ones up to the first or, where that makes fewer tasks than the last, the second."""
_POLL = 0.02, 2.0  # seconds between two looks, at first and at last
_POLL_DETACHED = 0.5, 5.0  # where a look is a question to a controller that many ask
_PAUSES = (
    0.0,
    5.0,
    60.0,
)  # seconds before a task is handed out again: a network file system may hide a record for so long
_JOBS = "jobs.json"
_WHAT = {"measured": "measuring", "finished": "perturbing", "compared": "verifying"}
_log = get_logger(__name__)


def grouped(shards: Sequence[ShardPlan]) -> Iterator[tuple[ShardPlan, ...]]:
    """Yield the shards of each task: starting one takes a second or so, which is not to be spent on 10 MB."""
    least = min(_MOST, max(_LEAST, sum(shard.nbytes for shard in shards) / _FEW))
    group: tuple[ShardPlan, ...] = ()
    for shard in shards:
        group += (shard,)
        if sum(each.nbytes for each in group) >= least:
            yield group
            group = ()
    if group:
        yield group


@dataclass
class _Try:
    """Shards that are handed out together, and how often they were lost since one of them was recorded."""

    shards: tuple[ShardPlan, ...]
    lost: int = 0
    due: float = 0.0
    folder: Path = Path()


class HandOut:
    """Has an engine do one kind of work on shards.

    Args:
        task: the work, of all shards.
        missing: returns those of some shards that are not done.
    """

    def __init__(self, engine: Engine, task: Task, missing: Callable[[Collection[str]], list[str]]) -> None:
        self._engine, self._task, self._missing = engine, task, missing
        self._folder = task.records / "tasks" / os.urandom(6).hex()
        self._made = 0
        self._running: dict[str, _Try] = {}
        self._waiting: list[_Try] = []
        self._said: set[str] = set()

    def run(self, shards: Sequence[ShardPlan]) -> None:
        """Return when all shards are recorded.

        Raises:
            SurgeryError: what a task raised; or one was lost over and over.
        """
        self._waiting = [_Try(group) for group in grouped(shards)]
        self._end_former()
        try:
            with bar(sum(shard.nbytes for shard in shards), _WHAT[self._task.kind]) as on_bytes:
                first, longest = _POLL_DETACHED if self._engine.is_detached else _POLL
                left, pause = {shard.name: shard.nbytes for shard in shards}, first
                while self._running or self._waiting:
                    self._submit()
                    changed = self._collect()
                    missing = self._missing(left)
                    on_bytes(sum(left.values()) - sum(left[name] for name in missing))
                    left = {name: left[name] for name in missing}
                    pause = first if changed else min(longest, pause * 1.2)
                    if self._running or self._waiting:
                        time.sleep(pause)
        finally:
            self._engine.cancel(list(self._running))

    def _end_former(self) -> None:
        """End what a former driver has left running, which would do the same work."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            former = json.loads(read_file(self._task.records / _JOBS))
            if self._engine.is_detached and former["engine"] == self._engine.name:
                self._engine.cancel([str(id) for id in former["jobs"]])

    def _submit(self) -> None:
        now = time.monotonic()
        due = [each for each in self._waiting if each.due <= now]
        if not due:
            return
        self._waiting = [each for each in self._waiting if each.due > now]
        jobs = []
        for each in due:
            each.folder = self._folder / str(self._made)
            self._made += 1
            jobs.append(self._task.of(each.shards).job(each.folder))
        ids = self._engine.submit(jobs)
        self._running |= dict(zip(ids, due, strict=True))  # at once: an interruption cancels what is there
        jobs_now = {"engine": self._engine.name, "jobs": list(self._running)}
        write_whole(self._task.records / _JOBS, json.dumps(jobs_now))

    def _collect(self) -> bool:
        """Take the tasks that have ended off the list; tell whether there were any."""
        states = self._engine.poll(list(self._running))
        ended = [self._running.pop(id) for id, state in states.items() if state is State.ENDED]
        for each in ended:
            self._settle(each)
        return bool(ended)

    def _settle(self, ended: _Try) -> None:
        lines = _lines_of(ended.folder)
        missing = self._missing([shard.name for shard in ended.shards])
        if not missing:
            self._say(lines)
            return
        result = Result.read(ended.folder)
        last = lines[-1] if lines else "no word of it"
        if result and result.code in KINDS:
            raise KINDS[result.code](last)
        if result and result.code == 1:
            raise OutputError(f"{ended.folder}: expected a task to end, got: {last}")
        lost = ended.lost + 1 if len(missing) == len(ended.shards) else 1
        if lost > len(_PAUSES):
            raise OutputError(
                f"{some(missing)}: expected a task to end, got it lost {lost} times: {last}. Check the machines, and "
                "run the same command again."
            )
        _log.warning("%s: lost with its task (%s): doing it again", some(missing), last)
        again = tuple(shard for shard in ended.shards if shard.name in missing)
        self._waiting.append(_Try(again, lost, time.monotonic() + _PAUSES[lost - 1]))

    def _say(self, lines: Iterable[str]) -> None:
        """Hand on what a task has warned of, once."""
        for line in lines:
            if line not in self._said:
                self._said.add(line)
                _log.warning("%s", line)


def _lines_of(folder: Path) -> list[str]:
    """Return what a task has printed."""
    try:
        return [line.strip() for line in read_file(folder / LOG).decode(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
