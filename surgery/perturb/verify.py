"""verify_checkpoint: compute every shard again from source and recipe, and compare with what is there, bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from surgery.checkpoint.digests import SHA256, algorithm_of, digest_of, hex_of, shorten
from surgery.checkpoint.layout import CARD, RECIPE, Layout, WeightSet, is_weight
from surgery.checkpoint.resolve import Checkpoint, resolve
from surgery.checkpoint.weight_file import digests_of_sources, open_safetensors
from surgery.display import Brief
from surgery.errors import NoWeightsError, SourceError
from surgery.escapes import printable
from surgery.files import list_names
from surgery.perturb.compare_file import TensorMismatch
from surgery.perturb.compare_recipe import recipe_faults
from surgery.perturb.crew import LOCAL, Crew, open_crew
from surgery.perturb.plan import Plan
from surgery.perturb.replay import find_recipe, find_source, plan_replay
from surgery.perturb.shard_plan import ShardPlan
from surgery.perturb.shared import Records
from surgery.perturb.tasks import with_ties
from surgery.recipe import FileRecord, Recipe
from surgery.storage.url import Url, as_path

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
    engine: str = LOCAL,
) -> Verification:
    """Compute a perturbed checkpoint again, from its source and its recipe, and compare. Writes nothing.

    Args:
        folder: what `surgery perturb` wrote, its URL, or a Hub id, which may end in `@revision`.
        source: where the source is now, if not where the recipe says: Hub id, folder, file or URL.
        token: Hub token; default: the one stored on this machine.
        workers, engine: see perturb_checkpoint. Tasks of a cluster leave word in a folder below the current one, which
            is removed.
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
    with _opened(engine, plan, copy, workers) as crew:
        differences, wrong = _compare(recipe, todo, crew)
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


@contextmanager
def _opened(engine: str, plan: Plan, copy: Checkpoint, workers: int | None) -> Iterator[Crew]:
    """Get hold of an engine, with a folder below the current one in which its tasks leave word."""
    if engine == LOCAL:
        with open_crew(engine, plan, None, copy=copy, workers=workers) as crew:
            yield crew
        return
    with (
        TemporaryDirectory(prefix=".surgery-verify-", dir=Path.cwd(), ignore_cleanup_errors=True) as folder,
        open_crew(engine, plan, Records(Path(folder)), copy=copy, workers=workers) as crew,
    ):
        yield crew


def _compare(recipe: Recipe, shards: Sequence[ShardPlan], crew: Crew) -> tuple[list[TensorMismatch], list[str]]:
    """Stream shards past the files that they should be; return differences, and faults of headers and the recipe."""
    measured = crew.measure()
    found = crew.compare(shards, measured)
    entries = [found[shard.name] for shard in shards]
    differences = [TensorMismatch(**difference) for entry in entries for difference in entry["differences"]]
    faults = [fault for entry in entries for fault in entry["faults"]]
    pooled = measured.pooled.std if measured.pooled else None
    again = replace(recipe, pooled_std=pooled, files=tuple(FileRecord.from_json(entry["record"]) for entry in entries))
    return differences, faults + [f"{RECIPE}: {fault}" for fault in recipe_faults(recipe, again)]
