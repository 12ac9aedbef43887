"""The files of an output folder that a push sends: those its recipe names, checked by sha256, card and recipe."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from huggingface_hub.utils.sha import git_hash

from surgery.checkpoint.digests import sha256_of_all
from surgery.checkpoint.layout import CARD, JOURNAL, RECIPE, is_weight
from surgery.errors import OutputError
from surgery.recipe import Recipe


@dataclass(frozen=True)
class LocalFile:
    """One file: its name in the repository, its content as a path or bytes, its size in bytes."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @property
    def blob_id(self) -> str:
        """What git knows the content by."""
        return git_hash(self.content if isinstance(self.content, bytes) else self.content.read_bytes())


@dataclass(frozen=True)
class Contents:
    """What is pushed of a folder.

    Args:
        recipe: as pushed, without a path of this machine.
        items: the files to push, the recipe among them.
        is_recipe_only: the weights and their indexes are held back.
        held_back: these, which the folder need not hold.
        left_out: names of the other files in the folder, which the recipe does not name.
    """

    recipe: Recipe
    items: tuple[LocalFile, ...]
    is_recipe_only: bool
    held_back: tuple[LocalFile, ...]
    left_out: tuple[str, ...]

    @property
    def title(self) -> str:
        """What was done, in a line."""
        settings = self.recipe.settings
        return f"NoisyTune of {self.recipe.source}: lam {settings.lam:g}, seed {settings.seed}"


def read_contents(folder: Path, *, recipe_only: bool) -> Contents:
    """Choose what to push of a folder that `surgery perturb` wrote, and check it against the recipe.

    Args:
        recipe_only: hold back the weights and their indexes.
    Raises:
        OutputError: the folder is not ours or not finished, or a file is missing or altered.
        SourceError: its surgery.json is no recipe.
    """
    recipe = _read_recipe(folder)
    digests = {file.name: file.sha256 for file in recipe.files} | recipe.companions
    digests.pop(CARD, None)  # the user's to edit
    held = {name: sha256 for name, sha256 in digests.items() if recipe_only and is_weight(name)}
    pushed = [_item(folder, name, sha256) for name, sha256 in digests.items() if name not in held]
    _refuse_altered(pushed)
    if not (folder / CARD).is_file():  # a former push's card would stay, and speak of other weights
        raise OutputError(
            f"{folder / CARD}: expected a card, got none. Restore it, write one, or perturb again with `overwrite`."
        )
    content = _inside(folder, CARD).read_bytes()
    pushed.append(LocalFile(CARD, content, len(content), hashlib.sha256(content).hexdigest()))
    text = _without_local_path(folder)
    pushed.append(LocalFile(RECIPE, text, len(text), hashlib.sha256(text).hexdigest()))
    held_back = tuple(_item(folder, name, sha256) for name, sha256 in held.items())
    present = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    named = digests.keys() | {CARD, RECIPE}
    left_out = tuple(name for name in present if name not in named)
    return Contents(Recipe.from_json(text.decode()), tuple(pushed), recipe_only, held_back, left_out)


def _read_recipe(folder: Path) -> Recipe:
    wanted = f"{folder}: expected a folder that `surgery perturb` wrote, got"
    if not folder.is_dir():
        raise OutputError(f"{wanted} no folder. Correct the path.")
    if (folder / JOURNAL).exists():
        raise OutputError(
            f"{wanted} one that it did not finish. {JOURNAL} there has the command that finishes it; then push."
        )
    if not (folder / RECIPE).is_file():
        raise OutputError(f"{wanted} one without {RECIPE}. Push another kind of folder with `hf upload`.")
    return Recipe.read(folder / RECIPE)


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(folder.resolve()):  # Path.resolve fails for a link to itself
        raise OutputError(f"{path}: expected a file of this folder, got one outside of it. Replace it by a copy.")
    return path


def _item(folder: Path, name: str, sha256: str) -> LocalFile:
    path = _inside(folder, name).absolute()
    return LocalFile(name, path, path.stat().st_size if path.is_file() else 0, sha256)


def _refuse_altered(items: list[LocalFile]) -> None:
    for item in items:
        if isinstance(item.content, Path) and not item.content.is_file():
            raise OutputError(
                f"{item.content}: expected a file, as {RECIPE} names it, got none. "
                "Restore it, or perturb again with `overwrite`."
            )
    by_path = {item.content: item for item in items if isinstance(item.content, Path)}
    for path, found in sha256_of_all(by_path, "checking").items():
        if found != (sha256 := by_path[path].sha256):
            raise OutputError(
                f"{path}: expected sha256 {sha256[:12]}..., as in {RECIPE}, got {found[:12]}...: it was altered. "
                "Restore it, or perturb again with `overwrite`."
            )


def _without_local_path(folder: Path) -> bytes:
    """Return the recipe to push: of a local source and its links it names the folder or file alone."""
    text = (folder / RECIPE).read_bytes()
    document = json.loads(text)
    source = document["source"]
    if source["commit"] is not None:
        return text
    source["id"] = PurePath(source["id"]).name
    if "notes" in document:
        document["notes"] = [re.sub(r"( is a link to )/.*/", r"\1", note) for note in document["notes"]]
    return (json.dumps(document, indent=1) + "\n").encode()
