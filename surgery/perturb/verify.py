"""verify_checkpoint: compute every shard again from source and recipe, and compare with what is there, bit for bit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from surgery.checkpoint.digests import SHA256, algorithm_of, digest_of, hex_of, shorten
from surgery.checkpoint.layout import CARD, RECIPE, Layout, WeightSet, is_weight
from surgery.checkpoint.resolve import Checkpoint, resolve
from surgery.checkpoint.weight_file import digests_of_sources, open_safetensors, reading_workers
from surgery.display import Brief
from surgery.errors import NoWeightsError, SourceError
from surgery.escapes import printable
from surgery.files import list_names
from surgery.perturb import stream
from surgery.perturb.compare_file import FileComparison, TensorMismatch
from surgery.perturb.compare_recipe import recipe_faults
from surgery.perturb.plan import Plan
from surgery.perturb.replay import find_recipe, find_source, plan_replay, refuse_other_source
from surgery.perturb.shard import ShardTask
from surgery.perturb.shard_plan import ShardPlan
from surgery.perturb.tasks import make_record, make_task, measure, with_ties
from surgery.progress import bar
from surgery.recipe import FileRecord, Recipe
from surgery.storage.url import Url, as_path
from surgery.threads import streaming_workers

_OWNERS = (CARD, ".gitattributes")  # the card is its owner's to edit, and the Hub adds to .gitattributes


@dataclass(frozen=True, repr=False)
class Verification(Brief):
    """What `verify_checkpoint` found.

    Args:
        folder: what was verified, as it was named.
        source, commit: of the recipe.
        tensors: how many were compared.
        nbytes: size of the weight files that were compared.
        differences: tensors with other bits than they should have, the worst first.
        faults: everything else that is not as it should be, a sentence each.
    """

    folder: str
    source: str
    commit: str | None
    tensors: int
    nbytes: int
    differences: tuple[TensorMismatch, ...]
    faults: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether the checkpoint is, bit for bit, what its recipe says."""
        return not self.differences and not self.faults


def verify_checkpoint(
    folder: str | Path,
    *,
    source: str | Path | None = None,
    token: str | None = None,
    workers: int | None = None,
) -> Verification:
    """Compute a perturbed checkpoint again, from its source and its recipe, and compare. Writes nothing.

    Args:
        folder: what `surgery perturb` wrote, its URL, or a Hub id, which may end in `@revision`.
        source: where the source is now, if not where the recipe says: Hub id, folder, file or URL.
        token: Hub token; default: the one stored on this machine.
        workers: threads; default: three per core, at most 16.
    Returns:
        What differs, if anything does.
    Raises:
        SourceError: there is no recipe, or the source is missing or not the one that the recipe was made from.
    """
    copy, names, recipe = _find(folder, token)
    checkpoint = find_source(recipe, str(folder), source=source, token=token)
    plan = with_ties(plan_replay(recipe, checkpoint, copy.root))
    damaged = list(_header_faults(plan, copy, names))
    todo = [shard for shard in plan.shards if shard.name in names and shard.name not in dict(damaged)]
    faults = [*_companion_faults(recipe, copy), *_weight_file_faults(recipe, names), *(fault for _, fault in damaged)]
    faults += _sha256_faults(recipe, copy, names)
    differences, wrong = _compare(
        plan, recipe, todo, copy, workers or reading_workers(streaming_workers(), checkpoint, copy)
    )
    return Verification(
        folder=str(folder),
        source=recipe.source,
        commit=recipe.commit,
        tensors=sum(len(shard.header.tensors) for shard in todo),
        nbytes=sum(shard.nbytes for shard in todo),
        differences=tuple(sorted(differences, key=_badness, reverse=True)),
        faults=tuple(map(printable, (*faults, *wrong))),
    )


def _badness(difference: TensorMismatch) -> tuple[bool, float, int]:
    size = difference.max_over_std if difference.std else difference.max_abs
    return difference.not_finite > 0, size or 0.0, difference.differing


def _find(folder: str | Path, token: str | None) -> tuple[Checkpoint, set[str], Recipe]:
    """Return the checkpoint, which may not be what its recipe says, the names of its files, and its recipe."""
    found = find_recipe(folder, token=token)
    recipe, place = found.recipe, found.path.parent
    weights = WeightSet("", "", None, ".safetensors", tuple(file.name for file in recipe.files))
    recorded = Layout((weights,), tuple(recipe.companions), ())
    if isinstance(place, Url):
        from surgery.checkpoint.remote import RemoteFiles

        files = RemoteFiles(place)
        return Checkpoint(str(place), None, files.root, recorded, remote=files), set(files.entries), recipe
    if as_path(folder).exists():
        names = {name for name in list_names(place) if (place / name).is_file()}
        return Checkpoint(str(place), None, place, recorded), names, recipe
    try:
        copy = resolve(f"{str(folder).partition('@')[0]}@{place.name}", variant=recipe.variant, token=token)
    except NoWeightsError as error:
        raise SourceError(
            f"{folder}: expected the weights that {RECIPE} names, got a repository without any. "
            f"`surgery materialize {folder}` writes them."
        ) from error
    layout = copy.layout
    there = [name for weight_set in layout.weights for name in weight_set.files]
    return copy, {*there, *layout.companions, *(name for name, _ in layout.left_out)}, recipe


def _companion_faults(recipe: Recipe, copy: Checkpoint) -> Iterator[str]:
    for name, digest in recipe.companions.items():
        if name in _OWNERS:
            continue
        found = digest_of(copy.path(name), algorithm_of(digest)) if copy.holds(name) else ""
        if found != digest:
            what = f"another ({shorten(found)})" if found else "none"
            yield f"{name}: expected the source's file ({shorten(digest)}), got {what}."


def _weight_file_faults(recipe: Recipe, names: set[str]) -> Iterator[str]:
    recorded = {file.name for file in recipe.files}
    for name in sorted(recorded - names):
        yield f"{name}: expected a weight file, got none."
    for name in sorted(name for name in names - recorded - recipe.companions.keys() if is_weight(name)):
        yield f"{name}: expected no weights but the recipe's, got a file that a loader may take for them."


def _sha256_faults(recipe: Recipe, copy: Checkpoint, names: set[str]) -> Iterator[str]:
    """Compare files with what a pushed recipe says that the Hub knows them by."""
    weights = {file.name: f"{SHA256}:{recipe.sha256[file.name]}" for file in recipe.files if file.name in recipe.sha256}
    found = digests_of_sources(copy, {name: digest for name, digest in weights.items() if name in names})
    for name, digits in recipe.sha256.items():
        if name not in recipe.digests:
            yield f"{RECIPE}: sha256: expected a file of the recipe, got {name}."
        elif name in names:
            given = hex_of(found[name] if name in found else digest_of(copy.path(name), SHA256))
            if given != digits:
                yield f"{RECIPE}: {name}: sha256: expected {given}, as the file gives, got {digits} in the recipe."


def _header_faults(plan: Plan, copy: Checkpoint, names: set[str]) -> Iterator[tuple[str, str]]:
    """Name the files that are no safetensors, and say why."""
    for shard in plan.shards:
        if shard.name in names:
            try:
                open_safetensors(copy, shard.name).close()
            except SourceError as error:
                yield shard.name, str(error)


def _compare(
    plan: Plan, recipe: Recipe, shards: Sequence[ShardPlan], copy: Checkpoint, workers: int
) -> tuple[list[TensorMismatch], list[str]]:
    """Stream shards past the files that they should be; return differences, and faults of headers and the recipe."""
    by_name = {shard.name: shard for shard in shards}
    recorded = {file.name: file for file in recipe.files}
    measured = measure(plan, workers)
    made: dict[str, FileRecord] = {}
    differences: list[TensorMismatch] = []
    faults: list[str] = []

    def settle(task: ShardTask) -> None:
        label, expected = plan.checkpoint.label(by_name[task.name].source), recorded[task.name].source_digest
        refuse_other_source(label, task.source_digest, expected)
        assert isinstance(task.sink, FileComparison)
        record = made[task.name] = make_record(task, by_name[task.name], measured)
        stds = {tensor.name: tensor.std for tensor in record.tensors}
        differences.extend(replace(d, std=stds[d.name]) for d in task.sink.differences.values())
        faults.extend(task.sink.faults())
        task.sink.close()

    tasks = (make_task(plan, shard, measured, partial(_open_comparison, copy, shard)) for shard in shards)
    with bar(sum(shard.nbytes for shard in shards), "verifying") as on_bytes:
        stream.run(tasks, plan.settings, workers=workers, on_done=settle, on_bytes=on_bytes)
    pooled = measured.pooled.std if measured.pooled else None
    again = replace(recipe, pooled_std=pooled, files=tuple(made[shard.name] for shard in shards))
    return differences, faults + [f"{RECIPE}: {fault}" for fault in recipe_faults(recipe, again)]


def _open_comparison(copy: Checkpoint, shard: ShardPlan) -> FileComparison:
    return FileComparison(open_safetensors(copy, shard.name), shard.name, shard.header)
