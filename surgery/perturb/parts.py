"""One part of a run, as `--array I/N` has it: every N-th shard, and the end of the run by whichever part is the last.

Parts run on any machines that see the source and the output folder, at once or one after the other. The lock is held
to begin and to complete the folder, and not between.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from surgery.checkpoint.layout import RECIPE
from surgery.checkpoint.weight_file import reading_workers
from surgery.errors import OutputError
from surgery.perturb import here
from surgery.perturb.complete import complete
from surgery.perturb.output import OutputFolder, is_finished
from surgery.perturb.output_errors import as_output_error
from surgery.perturb.plan import Plan
from surgery.perturb.same_run import already_done, kept_moments, open_shared
from surgery.perturb.shard_plan import ShardPlan
from surgery.perturb.shared import MEASURED, GoneError
from surgery.perturb.tasks import GlobalMoments, with_ties
from surgery.recipe import Recipe
from surgery.threads import streaming_workers

_LONGEST_WAIT = 60.0
"""Seconds that another part may take to begin or to complete the folder."""
_VERSION, _TIED = "version", "tied"
"""Notes in the journal."""


@dataclass(frozen=True)
class Part:
    """One of `count` parts of a run, `index` from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, shards: Sequence[ShardPlan]) -> Sequence[ShardPlan]:
        """Return the part's own shards: none where there are more parts than shards."""
        return shards[self.index :: self.count]

    def own_first(self, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
        """Return all shards, in an order in which parts that run at once begin with others."""
        return [shard for turn in range(self.count) for shard in shards[(self.index + turn) % self.count :: self.count]]


@dataclass(frozen=True)
class PartDone:
    """What came of a part.

    Args:
        shards: of the part, that are finished.
        left: shards that are not: those of other parts, and what another process has taken over.
        recipe: of the whole run, if nothing is left.
    """

    part: Part
    shards: tuple[str, ...]
    left: tuple[str, ...]
    recipe: Recipe | None


def execute_part(plan: Plan, part: Part, *, overwrite: bool = False, workers: int | None = None) -> PartDone:
    """Write the shards of one part, and complete the folder if those of all others are there.

    What nobody has measured yet of scale="global" it measures itself, its own shards first. A part that was killed is
    finished by running it again.

    Raises:
        SettingError, SourceError, OutputError: as perturb_checkpoint; or other parts are of another version.
    """
    own = tuple(shard.name for shard in part.of(plan.shards))
    if recipe := already_done(plan):
        return PartDone(part, own, (), recipe)
    folder = open_shared(plan, "array")
    plan = _join(plan, folder, overwrite=overwrite)
    try:
        with as_output_error(folder.path, plan.command):
            _write(plan, part, folder, workers or reading_workers(streaming_workers(), plan.checkpoint))
            finished = folder.finished_by_now()
    except GoneError:
        if recipe := already_done(plan):  # somebody has done all of it
            return PartDone(part, own, (), recipe)
        raise
    left = tuple(shard.name for shard in plan.shards if shard.name not in finished)
    own = tuple(name for name in own if name in finished)
    return PartDone(part, own, left, None if left else _complete(plan, folder))


def _join(plan: Plan, folder: OutputFolder, *, overwrite: bool) -> Plan:
    """Begin the folder, or go on with what other parts do; return the plan with what they have found to be tied."""
    plan = with_ties(plan, folder.peek().get(_TIED))
    with folder.lock(wait=_LONGEST_WAIT):
        folder.join(overwrite=overwrite)
        mine, theirs = version("model-surgery"), folder.notes.get(_VERSION)
        if theirs not in (None, mine):
            raise OutputError(
                f"{folder.path}: expected model-surgery {theirs}, which other parts have, got {mine}. Install one "
                "version on all machines."
            )
        if theirs is None:
            folder.note(_VERSION, mine)
            folder.note(_TIED, {shard.name: shard.tied for shard in plan.shards if shard.tied})
    return plan


def _write(plan: Plan, part: Part, folder: OutputFolder, workers: int) -> None:
    finished = folder.finished_by_now()
    todo = [shard for shard in part.of(plan.shards) if shard.name not in finished]
    try:
        measured = _measure(plan, part, folder, workers) if todo else GlobalMoments()
        here.write(plan, todo, measured, workers, folder.shared)
    finally:
        folder.shared.abandon()


def _measure(plan: Plan, part: Part, folder: OutputFolder, workers: int) -> GlobalMoments:
    if plan.settings.scale != "global":
        return GlobalMoments()
    if kept := kept_moments(plan, folder):
        return kept
    records = folder.shared.records
    here.measure(
        plan,
        part.own_first(plan.shards),
        workers,
        partial(records.write, MEASURED),
        is_due=lambda shard: not records.has(MEASURED, shard.name),
    )
    return GlobalMoments.from_entries(records.read(MEASURED))


def _complete(plan: Plan, folder: OutputFolder) -> Recipe:
    """Write index, recipe and card, unless another part has."""
    with folder.lock(wait=_LONGEST_WAIT):
        if is_finished(folder.path):
            return Recipe.read(folder.path / RECIPE)
        folder.prepare(overwrite=False)
        measured = kept_moments(plan, folder)
        return complete(plan, folder, measured.pooled if measured else None)
