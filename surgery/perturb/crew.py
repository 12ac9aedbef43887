"""Who does the work on a plan's shards: the threads of this process, or the processes of an engine."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from surgery.perturb import here
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

    def write(self, shards: Sequence[ShardPlan], measured: GlobalMoments, folder: OutputFolder) -> None:
        """Write shards to the folder, which then knows of them."""
        ...

    def compare(self, shards: Sequence[ShardPlan], measured: GlobalMoments) -> dict[str, Any]:
        """Compare shards with the files that they should be; return what came of each, by name."""
        ...


@contextmanager
def open_crew(engine: str, plan: Plan, records: Records, *, workers: int | None) -> Iterator[Crew]:
    """Get hold of an engine, by its name, for the body.

    Args:
        records: where processes of an engine leave word; every node sees it.
        workers: threads, of each task where an engine has tasks; None: three per core, of which a task has one.
    Raises:
        SettingError: it is not installed or not reachable.
    """
    if engine == LOCAL:
        yield _Here(plan, workers or streaming_workers())
        return
    from surgery.engines.registry import open_engine

    opened = open_engine(engine, logs=records.folder / engine)
    try:
        yield _OnEngine(opened, plan, records, workers or THREADS_PER_CORE)
    finally:
        opened.close()


def count_tasks(engine: str, plan: Plan) -> int:
    """Return how many tasks an engine would be handed; none if it has no tasks."""
    if engine == LOCAL:
        return 0
    from surgery.perturb.hand_out import grouped

    return len(list(grouped(plan.shards)))


class _Here:
    def __init__(self, plan: Plan, workers: int) -> None:
        self._plan, self._workers = plan, workers

    def measure(self) -> GlobalMoments:
        return here.measure_all(self._plan, self._workers)

    def write(self, shards: Sequence[ShardPlan], measured: GlobalMoments, folder: OutputFolder) -> None:
        here.write(self._plan, shards, measured, self._workers, folder)

    def compare(self, shards: Sequence[ShardPlan], measured: GlobalMoments) -> dict[str, Any]:
        found: dict[str, Any] = {}
        here.compare(self._plan, shards, measured, self._workers, found.__setitem__)
        return found


class _OnEngine:
    def __init__(self, engine: "Engine", plan: Plan, records: Records, workers: int) -> None:
        self._engine, self._plan, self._records, self._workers = engine, plan, records, workers

    def measure(self) -> GlobalMoments:
        if self._plan.settings.scale != "global":
            return GlobalMoments()
        self._run(MEASURED, self._plan.shards, GlobalMoments(), partial(self._records.missing, MEASURED))
        return GlobalMoments.from_entries(self._records.read(MEASURED))

    def write(self, shards: Sequence[ShardPlan], measured: GlobalMoments, folder: OutputFolder) -> None:
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

        self._records.prepare()
        todo = [shard for shard in shards if shard.name in missing([shard.name])]
        hand_out = HandOut(
            self._engine, self._plan, kind, self._records, measured, missing=missing, workers=self._workers
        )
        hand_out.run(todo)
