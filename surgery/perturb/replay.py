"""Plan a recorded run again from recipe and source, which materialize and verify do alike."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint.digests import algorithm_of, digest_of, digest_of_bytes, shorten
from surgery.checkpoint.layout import CARD, JOURNAL, RECIPE
from surgery.checkpoint.resolve import REPO_ID, Checkpoint, resolve
from surgery.checkpoint.unfinished import refuse_unfinished, unfinished
from surgery.errors import SettingError, SourceError, some
from surgery.perturb.plan import Plan, plan_checkpoint
from surgery.recipe import Recipe
from surgery.storage.url import Url, as_path, find_url


@dataclass(frozen=True)
class FoundRecipe:
    """A recipe, and where its surgery.json is: on this machine, or on a store."""

    recipe: Recipe
    path: Path | Url


def find_recipe(where: str | Path, *, token: str | None) -> FoundRecipe:
    """Find and read a surgery.json, fetching it and nothing else if `where` is on the Hub or on a store.

    Args:
        where: a surgery.json, a folder that holds one, its URL, or a Hub id, which may end in `@revision`.
    Raises:
        SourceError: there is none, or it is damaged.
    """
    if url := find_url(where):
        return _fetch_from_store(url)
    path = _find_path(where, token)
    return FoundRecipe(Recipe.read(path), path)


def _fetch_from_store(url: Url) -> FoundRecipe:
    from surgery.storage.store import Store

    folder, name = (url.parent, url.name) if url.name.endswith(".json") else (url, RECIPE)
    store = Store(folder, SourceError)
    if name == RECIPE and store.entry(JOURNAL):
        raise unfinished(str(folder))
    entry = store.entry(name)
    if entry is None:
        raise SourceError(f"{url}: expected a {RECIPE}, or a folder that holds one, got none of them. Check the URL.")
    text = store.read(name, 0, entry.size).decode(errors="replace")
    return FoundRecipe(Recipe.from_json(text, what=str(folder / name)), folder / name)


def _find_path(where: str | Path, token: str | None) -> Path:
    path = as_path(where)
    if str(where) and path.is_dir():
        refuse_unfinished(path)
        path /= RECIPE
    if path.is_file() and path.suffix == ".json":
        return path.absolute()
    repo_id, _, revision = str(where).partition("@")
    if path.exists() or path.name == RECIPE or not REPO_ID.fullmatch(repo_id) or isinstance(where, Path):
        raise SourceError(
            f"{where}: expected a {RECIPE}, a folder that holds one, or a Hub id, got none of them. Check the name."
        )
    return _fetch_recipe(repo_id, revision or None, token)


def _fetch_recipe(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from surgery.checkpoint.hub import fetch_file
    from surgery.checkpoint.hub_errors import FETCH, one_line

    what = f"{repo_id}@{revision}" if revision else repo_id
    with one_line(what, repo_id, FETCH):
        try:
            return fetch_file(repo_id, RECIPE, revision=revision, token=token)
        except LocalEntryNotFoundError:  # offline: an EntryNotFoundError too
            raise
        except EntryNotFoundError as error:
            raise SourceError(
                f"{what}: expected a repository with {RECIPE}, got one without. Name one that `surgery push` wrote."
            ) from error


def find_source(recipe: Recipe, what: str, *, source: str | Path | None, token: str | None) -> Checkpoint:
    """Find the checkpoint that a recipe was made from, on the Hub or where it was on this machine.

    Args:
        what: the recipe's name in errors.
        source: where it is now, if that is elsewhere.
    Raises:
        SourceError: it is not there, or the recipe is not one of a checkpoint.
    """
    if not all(file.name for file in recipe.files):
        raise SourceError(
            f"{what}: expected the recipe of a checkpoint, got that of a live model, {recipe.source}. "
            "Call perturb_model with its settings."
        )
    if source is None and recipe.commit:
        source = f"{recipe.source}@{recipe.commit}"
    elif source is None and find_url(recipe.source):
        source = recipe.source
    elif source is None:
        source = Path(recipe.source)
        # Path's own fails for a name that is too long
        if not source.is_absolute() or not os.path.exists(source):  # noqa: PTH110
            raise SourceError(
                f"{what}: expected its source, {recipe.source}, on this machine, got no such path. "
                "Say with `source` where it is."
            )
    return resolve(source, variant=recipe.variant, key=recipe.key, dequantize=recipe.dequantize, token=token)


def plan_replay(recipe: Recipe, checkpoint: Checkpoint, out: Path | Url) -> Plan:
    """Plan a recipe's run on its source, under the name that the source had.

    What it took for buffers is left alone, and nothing else: later versions may know better which tensors are buffers.

    Raises:
        SourceError: the source has other weight files or other companions than the recipe's, or none that its settings
            could be for.
    """
    layout = checkpoint.layout
    known = replace(
        layout,
        companions=tuple(name for name in layout.companions if name in recipe.companions or name == CARD),
        left_out=tuple(recipe.left_out.items()),
    )
    repeating = {file.source: file.tied for file in recipe.files}
    checkpoint = replace(checkpoint, layout=known, repeating=repeating)
    try:
        plan = plan_checkpoint(checkpoint, out, recipe.settings, variant=recipe.variant, recorded=recipe)
    except SettingError as error:  # of the recipe's settings: the caller gave none
        raise SourceError(f"{RECIPE}: {error}") from error
    _refuse_other_files(plan, {file.name: file.source for file in recipe.files})
    _refuse_other_companions(plan, recipe.companions)
    return replace(plan, checkpoint=replace(checkpoint, id=recipe.source, commit=recipe.commit))


def _refuse_other_files(plan: Plan, recorded: Mapping[str, str]) -> None:
    found = {shard.name: shard.source for shard in plan.shards}
    if found != recorded:
        expected, got = (some(sorted(files.values())) for files in (recorded, found))
        raise SourceError(
            f"{plan.checkpoint.id}: expected the weight files that the recipe was made from ({expected}), got others "
            f"({got}). Say with `source` where the right ones are."
        )


def _refuse_other_companions(plan: Plan, recorded: Mapping[str, str]) -> None:
    for name, digest in recorded.items():
        label = plan.checkpoint.label(name)
        if made := plan.indexes.get(name) or plan.configs.get(name):
            refuse_other_source(label, digest_of_bytes(made, algorithm_of(digest)), digest)
        elif name in plan.companions:
            refuse_other_source(label, digest_of(plan.checkpoint.path(name), algorithm_of(digest)), digest)
        else:
            raise SourceError(
                f"{label}: expected a file of the recipe's source, got none. Say with `source` where the right one is."
            )


def refuse_other_source(label: str, digest: str, expected: str) -> None:
    """Refuse a file of the source that is not the one a recipe was made from.

    Raises:
        SourceError: their digests differ.
    """
    if digest != expected:
        raise SourceError(
            f"{label}: expected the recipe's source ({shorten(expected)}), got another file ({shorten(digest)}). "
            "Say with `source` where the right one is."
        )
