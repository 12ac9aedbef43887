"""Who does the work on a plan's shards: the threads of this process, or the processes of an engine."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from surgery.checkpoint.resolve import Checkpoint
from surgery.checkpoint.weight_file import reading_workers
from surgery.perturb import here
from surgery.perturb.destination import Destination
from surgery.perturb.output import OutputFolder
from surgery.perturb.plan import Plan
from surgery.perturb.shard_plan import ShardPlan
from surgery.perturb.shared import COMPARED, FINISHED, MEASURED, Records
from surgery.perturb.tasks import GlobalMoments
from surgery.threads import THREADS_PER_CORE, streaming_workers

if TYPE_CHECKING:
    from surgery.engines.engine import Engine

LOCAL = "local"


class Crew(Protocol):
    """Does what a run takes, all shards of it or some."""

    def measure(self) -> GlobalMoments:
        """Read everything once, if the plan's scale is "global"."""
        ...

    def write(self, shards: Sequence[ShardPlan], measured: GlobalMoments, folder: Destination) -> None:
        """Write shards to the folder, which then knows of them."""
        ...

    def compare(self, shards: Sequence[ShardPlan], measured: GlobalMoments) -> dict[str, Any]:
        """Compare shards with the files that they should be; return what came of each, by name."""
        ...


@contextmanager
def open_crew(
    engine: str, plan: Plan, records: Records | None, *, copy: Checkpoint | None = None, workers: int | None
) -> Iterator[Crew]:
    """Get hold of an engine, by its name, for the body.

    Args:
        records: where processes of an engine leave word; every node sees it. None: of those of this process.
        copy: what is compared, if anything is.
        workers: threads, of each task where an engine has tasks; None: three per core, of which a task has one.
    Raises:
        SettingError: it is not installed or not reachable.
    """
    if engine == LOCAL:
        read = [each for each in (plan.checkpoint, copy) if each]
        yield _Here(plan, copy, workers or reading_workers(streaming_workers(), *read))
        return
    assert records
    from surgery.engines.registry import open_engine

    opened = open_engine(engine, logs=records.folder / engine)
    try:
        yield _OnEngine(opened, plan, copy, records, workers or THREADS_PER_CORE)
    finally:
        opened.close()


def count_tasks(engine: str, plan: Plan) -> int:
    """Return how many tasks an engine would be handed; none if it has no tasks."""
    if engine == LOCAL:
        return 0
    from surgery.perturb.hand_out import grouped

    return len(list(grouped(plan.shards)))


class _Here:
    def __init__(self, plan: Plan, copy: Checkpoint | None, workers: int) -> None:
        self._plan, self._copy, self._workers = plan, copy, workers

    def measure(self) -> GlobalMoments:
        return here.measure_all(self._plan, self._workers)

    def write(self, shards: Sequence[ShardPlan], measured: GlobalMoments, folder: Destination) -> None:
        here.write(self._plan, shards, measured, self._workers, folder)

    def compare(self, shards: Sequence[ShardPlan], measured: GlobalMoments) -> dict[str, Any]:
        found: dict[str, Any] = {}
        assert self._copy
        here.compare(self._plan, shards, measured, self._copy, self._workers, found.__setitem__)
        return found


class _OnEngine:
    def __init__(self, engine: "Engine", plan: Plan, copy: Checkpoint | None, records: Records, workers: int) -> None:
        self._engine, self._plan, self._copy = engine, plan, copy
        self._records, self._workers = records, workers

    def measure(self) -> GlobalMoments:
        if self._plan.settings.scale != "global":
            return GlobalMoments()
        self._run(MEASURED, self._plan.shards, GlobalMoments(), partial(self._records.missing, MEASURED))
        return GlobalMoments.from_entries(self._records.read(MEASURED))

    def write(self, shards: Sequence[ShardPlan], measured: GlobalMoments, folder: Destination) -> None:
        assert isinstance(folder, OutputFolder)
        self._run(FINISHED, shards, measured, folder.shared.missing)
        folder.gather()

    def compare(self, shards: Sequence[ShardPlan], measured: GlobalMoments) -> dict[str, Any]:
        self._run(COMPARED, shards, measured, partial(self._records.missing, COMPARED))
        return self._records.read(COMPARED)

    def _run(
        self,
        kind: str,
        shards: Sequence[ShardPlan],
        measured: GlobalMoments,
        missing: Callable[[Collection[str]], list[str]],
    ) -> None:
        from surgery.perturb.hand_out import HandOut
        from surgery.perturb.task import Task

        self._records.prepare()
        todo = [shard for shard in shards if shard.name in missing([shard.name])]
        task = Task(kind, self._plan, measured, self._copy, self._records.folder, self._workers)
        HandOut(self._engine, task, missing).run(todo)
