"""From a Plan to the ShardTasks that stream it, and from their results to the records of the recipe."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from surgery.checkpoint.digests import algorithm_of, is_digest
from surgery.checkpoint.weight_file import WeightFile, open_weights
from surgery.errors import SourceError
from surgery.noisytune import NO_SPREAD, Moments, pool
from surgery.perturb.plan import Plan
from surgery.perturb.shard import ShardTask, Sink
from surgery.perturb.shard_plan import ShardPlan
from surgery.perturb.ties import find_ties
from surgery.recipe import FileRecord, TensorRecord


def with_ties(plan: Plan, known: Mapping[str, dict[str, str]] | None = None) -> Plan:
    """Add the tensors that repeat another one, which only their bytes tell; of a run that is repeated, its recipe.

    Args:
        known: what another process has found.
    """
    if plan.recorded:
        return replace(plan, shards=tuple(_recorded_ties(plan, {file.name: file.tied for file in plan.recorded.files})))
    ties = find_ties(plan.shards, partial(open_weights, plan.checkpoint)) if known is None else known
    shards = [replace(shard, tied=shard.tied | ties.get(shard.name, {})) for shard in plan.shards]
    return replace(plan, shards=tuple(shards))


def _recorded_ties(plan: Plan, recorded: Mapping[str, Mapping[str, str]]) -> Iterator[ShardPlan]:
    """Yield the shards with what was tied then, as far as the source has such tensors."""
    names = {tensor.name for shard in plan.shards for tensor in shard.header.tensors}
    for shard in plan.shards:
        own = {tensor.name for tensor in shard.header.tensors}
        ties = {name: kept for name, kept in recorded[shard.name].items() if name in own and kept in names}
        yield replace(shard, tied=shard.tied | ties)


@dataclass(frozen=True)
class GlobalMoments:
    """What scale="global" has to know of all shards before the first is perturbed; for other scales, nothing.

    Args:
        digests: of each shard's source, by the shard's name.
        moments: of each tensor that may be perturbed, by shard and name.
    """

    digests: dict[str, str] = field(default_factory=dict)
    moments: dict[str, dict[str, Moments]] = field(default_factory=dict)

    @property
    def pooled(self) -> Moments | None:
        """Moments of all perturbed elements together, or None if nothing was measured."""
        spreads = [m for shard in self.moments.values() for m in shard.values() if m.std]
        return pool(spreads) if self.moments else None

    @property
    def entries(self) -> dict[str, Any]:
        """What `from_entries` puts together."""
        return {name: self.entry(self.digests[name], moments) for name, moments in self.moments.items()}

    @staticmethod
    def entry(digest: str, moments: Mapping[str, Moments]) -> dict[str, Any]:
        """Return what of a shard that was measured is to be kept, as JSON."""
        return {"source_digest": digest, "moments": {tensor: [m.n, m.mean, m.m2] for tensor, m in moments.items()}}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> "GlobalMoments":
        """Put the entries of all shards together, by their names."""
        moments = {name: {t: Moments(*m) for t, m in entry["moments"].items()} for name, entry in entries.items()}
        return cls({name: entry["source_digest"] for name, entry in entries.items()}, moments)

    @classmethod
    def from_journal(cls, document: Any, plan: Plan) -> "GlobalMoments | None":
        """Return what a journal keeps, if the plan can go on with it: of all shards, and with today's fields."""
        try:
            kept = cls.from_entries(document)
        except (AttributeError, KeyError, TypeError):
            return None
        wanted = {shard.name: plan.source_algorithm(shard.source) for shard in plan.shards}
        found = {name: algorithm_of(digest) for name, digest in kept.digests.items() if is_digest(digest)}
        return kept if found == wanted else None


def make_task(plan: Plan, shard: ShardPlan, measured: GlobalMoments, open_sink: Callable[[], Sink] | None) -> ShardTask:
    """Make the task that hands one shard to what `open_sink` opens, or only measures it."""
    flat = {name for name, moments in measured.moments.get(shard.name, {}).items() if not moments.std}
    pooled = measured.pooled
    return ShardTask(
        name=shard.name,
        label=plan.checkpoint.label(shard.source),
        open_source=partial(_open_planned, plan, shard),
        open_sink=open_sink,
        copied=frozenset(shard.copied.keys() | flat),
        algorithm=plan.algorithm(shard.name),
        source_algorithm=plan.source_algorithm(shard.source),
        tied=shard.tied,
        pooled_std=pooled.std if pooled else None,
        source_digest=measured.digests.get(shard.name, ""),
        source_version=plan.source_version(shard.source),
    )


def _open_planned(plan: Plan, shard: ShardPlan) -> WeightFile:
    """Open the source of a shard, which must hold what it held when it was planned."""
    source = open_weights(plan.checkpoint, shard.source)
    if source.header.raw != shard.header.raw:
        source.close()
        raise SourceError(
            f"{plan.checkpoint.label(shard.source)}: expected the tensors that were planned, got others: it changed "
            "meanwhile. Run again."
        )
    return source


def make_record(task: ShardTask, shard: ShardPlan, measured: GlobalMoments) -> FileRecord:
    """Say what a task that is done did to its shard."""
    moments = measured.moments.get(shard.name, task.moments)
    tensors = []
    for tensor in shard.header.tensors:
        std = moments[tensor.name].std if tensor.name in moments else None
        reason = shard.copied.get(tensor.name) or (None if std else NO_SPREAD)
        effect = task.effects.get(tensor.name)
        known = shard.roles[tensor.name].known
        tensors.append(TensorRecord(tensor.name, tensor.dtype, tensor.shape, std, reason, effect, known))
    return FileRecord(
        shard.name, task.digest, shard.source, task.source_digest, tuple(tensors), shard.tied, task.source_version
    )
