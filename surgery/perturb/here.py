"""The threads of this process at the shards of a plan: each is measured, written or compared."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from typing import Any, Protocol

from surgery.checkpoint.resolve import Checkpoint
from surgery.checkpoint.weight_file import open_safetensors
from surgery.perturb import stream
from surgery.perturb.compare_file import FileComparison
from surgery.perturb.compare_recipe import file_faults
from surgery.perturb.complete import refuse_faults
from surgery.perturb.plan import Plan
from surgery.perturb.replay import refuse_other_source
from surgery.perturb.shard import ShardTask, Sink
from surgery.perturb.shard_plan import ShardPlan
from surgery.perturb.tasks import GlobalMoments, make_record, make_task
from surgery.progress import bar
from surgery.recipe import FileRecord


class ShardFolder(Protocol):
    """Where shards are written: a Destination, or what several processes share of one."""

    def open_part(self, name: str) -> Sink: ...
    def finish_shard(self, name: str, part: Any, result: dict[str, Any]) -> None: ...


class _Discarded:
    """Where a shard goes of which only the digest is wanted."""

    def take(self, position: int, window: memoryview, nbytes: int) -> Callable[[], None]:  # noqa: ARG002
        """Take nothing."""
        return lambda: None

    def close(self) -> None:
        """Release nothing."""


def is_due(_: ShardPlan) -> bool:
    """Tell of any shard that nobody else has done it meanwhile."""
    return True


def measure(
    plan: Plan,
    shards: Sequence[ShardPlan],
    workers: int,
    keep: Callable[[str, dict[str, Any]], None],
    *,
    is_due: Callable[[ShardPlan], bool] = is_due,
) -> None:
    """Read shards, and have `keep` take what scale="global" has to know of each.

    Args:
        is_due: tells of a shard, when its turn has come, whether it is still to be measured.
    """
    with bar(sum(shard.nbytes for shard in shards), "measuring") as on_bytes:
        tasks = (make_task(plan, shard, GlobalMoments(), None) for shard in shards if is_due(shard))
        stream.run(
            tasks,
            plan.settings,
            workers=workers,
            on_done=lambda task: keep(task.name, GlobalMoments.entry(task.source_digest, task.moments)),
            on_bytes=on_bytes,
        )


def measure_all(plan: Plan, workers: int) -> GlobalMoments:
    """Read everything once, if the plan's scale is "global"."""
    if plan.settings.scale != "global":
        return GlobalMoments()
    entries: dict[str, Any] = {}
    measure(plan, plan.shards, workers, entries.__setitem__)
    return GlobalMoments.from_entries(entries)


def write(
    plan: Plan,
    shards: Sequence[ShardPlan],
    measured: GlobalMoments,
    workers: int,
    folder: ShardFolder,
    *,
    is_due: Callable[[ShardPlan], bool] = is_due,
) -> None:
    """Write shards to a folder, or with a plan of the recipe alone compute their records.

    Args:
        is_due: as of `measure`.
    """
    by_name = {shard.name: shard for shard in shards}
    with bar(sum(shard.nbytes for shard in shards), "perturbing") as on_bytes:
        stream.run(
            (
                make_task(plan, shard, measured, partial(_open_sink, plan, folder, shard.name))
                for shard in shards
                if is_due(shard)
            ),
            plan.settings,
            workers=workers,
            on_done=lambda task: _finish(task, plan, by_name[task.name], folder, measured),
            on_bytes=on_bytes,
            meanwhile=partial(import_module, "surgery.perturb.card"),  # it takes a while
        )


def _open_sink(plan: Plan, folder: ShardFolder, name: str) -> Sink:
    return _Discarded() if plan.is_recipe_only else folder.open_part(name)


def _finish(task: ShardTask, plan: Plan, shard: ShardPlan, folder: ShardFolder, measured: GlobalMoments) -> None:
    """Give a complete shard its name, with a note of what was done to it."""
    record = make_record(task, shard, measured)
    if plan.recorded:
        _refuse_other_source(record, plan, shard)
        recorded = next(file for file in plan.recorded.files if file.name == record.name)
        refuse_faults(file_faults(recorded, record), plan)
    part = None if plan.is_recipe_only else task.sink
    folder.finish_shard(shard.name, part, {"size": shard.nbytes, **record.to_json()})


def compare(
    plan: Plan,
    shards: Sequence[ShardPlan],
    measured: GlobalMoments,
    copy: Checkpoint,
    workers: int,
    keep: Callable[[str, dict[str, Any]], None],
) -> None:
    """Stream shards past the files of a copy that they should be, and have `keep` take what came of each, as JSON."""
    by_name = {shard.name: shard for shard in shards}
    with bar(sum(shard.nbytes for shard in shards), "verifying") as on_bytes:
        stream.run(
            (make_task(plan, shard, measured, partial(_open_comparison, copy, shard)) for shard in shards),
            plan.settings,
            workers=workers,
            on_done=lambda task: keep(task.name, _compared(task, plan, by_name[task.name], measured)),
            on_bytes=on_bytes,
        )


def _open_comparison(copy: Checkpoint, shard: ShardPlan) -> FileComparison:
    return FileComparison(open_safetensors(copy, shard.name), shard.name, shard.header)


def _compared(task: ShardTask, plan: Plan, shard: ShardPlan, measured: GlobalMoments) -> dict[str, Any]:
    record = make_record(task, shard, measured)
    _refuse_other_source(record, plan, shard)
    assert isinstance(task.sink, FileComparison)
    stds = {tensor.name: tensor.std for tensor in record.tensors}
    differences = [asdict(replace(d, std=stds[d.name])) for d in task.sink.differences.values()]
    faults = task.sink.faults()
    task.sink.close()
    return {"differences": differences, "faults": faults, "record": record.to_json()}


def _refuse_other_source(record: FileRecord, plan: Plan, shard: ShardPlan) -> None:
    """Refuse the source of a run that is repeated if it is another than that was."""
    if plan.recorded:
        label, expected = plan.checkpoint.label(shard.source), plan.recorded.source_digests[shard.source]
        refuse_other_source(label, record.source_digest, expected)
