"""The end of a run, when all shards are there: companions, indexes, card and recipe, in this order."""

from collections.abc import Iterator
from dataclasses import replace

from surgery.checkpoint.digests import digest_of_bytes, new_digest
from surgery.checkpoint.layout import CARD
from surgery.checkpoint.resolve import Checkpoint
from surgery.errors import OutputError, SourceError
from surgery.escapes import get_logger
from surgery.files import open_file
from surgery.noisytune import Moments
from surgery.perturb.compare_recipe import recipe_faults
from surgery.perturb.destination import Destination
from surgery.perturb.plan import Plan
from surgery.recipe import FileRecord, Recipe
from surgery.storage.url import Url

_CHUNK = 1 << 20
_log = get_logger(__name__)


def complete(plan: Plan, folder: Destination, pooled: Moments | None) -> Recipe:
    """Write what makes finished shards a checkpoint, and return its recipe.

    Args:
        folder: claimed, with all shards finished.
        pooled: of scale="global".
    Raises:
        SourceError: there was nothing to perturb.
        OutputError: what came out is not what the recipe says that the run repeats.
    """
    companions = _write_companions(plan, folder)
    recipe = _recipe(plan, folder, companions, pooled)
    if plan.recorded:
        refuse_faults(recipe_faults(plan.recorded, recipe), plan)
    recipe = _write_card(recipe, plan, folder)
    folder.finish(recipe.to_json())
    if plan.recorded and recipe.card != plan.recorded.card:
        _log.warning("%s: its text is not the one that the recipe records; all other files are", plan.out / CARD)
    return recipe


def refuse_faults(faults: list[str], plan: Plan) -> None:
    """Leave a repeated run unfinished whose recipe says something else than what comes out.

    Raises:
        OutputError: it does.
    """
    if faults:
        raise OutputError(f"{plan.out}: {faults[0]} The recipe was altered or is damaged: fetch it again.")


def _write_companions(plan: Plan, folder: Destination) -> dict[str, str]:
    """Copy every companion, and write the indexes and configs of our own; return their digests, by name."""
    digests = {}
    for name in plan.companions:
        if name in plan.configs:
            continue
        plan.checkpoint.refuse_changed(name)
        digest = new_digest(plan.algorithm(name))
        part = folder.open_part(name)
        path = plan.checkpoint.path(name)
        with open_file(path) as source:  # what fails of the part has a name already
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                part.append(memoryview(chunk))
        plan.checkpoint.refuse_changed(name)
        folder.finish_part(name, part)
        digests[name] = digest.text()
    for name, data in {**plan.configs, **plan.indexes}.items():
        if name in plan.configs or not plan.is_recipe_only:
            folder.write(name, data)
        digests[name] = digest_of_bytes(data, plan.algorithm(name))
    return digests


def _write_card(recipe: Recipe, plan: Plan, folder: Destination) -> Recipe:
    """Write the card, and note it in the recipe."""
    from surgery.perturb.card import make_card, read_metadata

    own = plan.checkpoint.path(CARD) if CARD in plan.checkpoint.layout.companions else None
    companions = plan.checkpoint.root if isinstance(plan.out, Url) else plan.out
    card = make_card(recipe, read_metadata(own) if own else {}, companions).encode()
    folder.write(CARD, card)
    return replace(recipe, card=digest_of_bytes(card, plan.algorithm(CARD)))


def _recipe(plan: Plan, folder: Destination, companions: dict[str, str], pooled: Moments | None) -> Recipe:
    files = tuple(FileRecord.from_json(folder.finished[shard.name]) for shard in plan.shards)
    recipe = Recipe(
        source=plan.checkpoint.id,
        commit=plan.checkpoint.commit,
        variant=plan.variant,
        key=plan.checkpoint.key,
        dequantize=plan.checkpoint.dequantize,
        settings=plan.settings,
        pooled_std=pooled.std if pooled else None,
        files=files,
        companions=companions,
        left_out=plan.left_out,
        notes=plan.recorded.notes if plan.recorded else tuple(_link_notes(plan.checkpoint)),
    )
    if plan.settings.lam and not any(tensor.copied is None for tensor in recipe.tensors):
        raise SourceError(
            f"{plan.checkpoint.id}: expected a tensor with spread, got none. There is nothing to perturb."
        )
    return recipe


def _link_notes(checkpoint: Checkpoint) -> Iterator[str]:
    return (f"{name} is a link to {target}" for name, target in checkpoint.links.items())
