"""The files of an output folder that a push sends: those its recipe names, checked by digest, card and recipe."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from huggingface_hub.utils.sha import git_hash

from surgery.checkpoint.digests import SHA256, algorithm_of, digest_of_bytes, digests_of_all, hex_of, shorten
from surgery.checkpoint.layout import CARD, JOURNAL, PLACE, RECIPE, is_weight
from surgery.display import Brief
from surgery.errors import OutputError
from surgery.files import list_names, read_file
from surgery.recipe import Recipe

_PLACES = re.compile(rf'(REPO=|"|"hf-hub:){PLACE}\b'.encode())


@dataclass(frozen=True, repr=False)
class LocalFile(Brief):
    """One file: its name in the repository, its content as a path or bytes, its size in bytes, the Hub's sha256."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @property
    def blob_id(self) -> str:
        """What git knows the content by."""
        return git_hash(self.content if isinstance(self.content, bytes) else read_file(self.content))


@dataclass(frozen=True, repr=False)
class Contents(Brief):
    """What is pushed of a folder.

    Args:
        recipe: as pushed, without a path of this machine and with the sha256 of what is sent.
        files: the files to push, but for the recipe.
        is_recipe_only: the weights and their indexes are held back.
        held_back: names of these, which the folder need not hold.
        left_out: names of the other files in the folder, which the recipe does not name.
    """

    recipe: Recipe
    files: tuple[LocalFile, ...]
    is_recipe_only: bool
    held_back: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def recipe_file(self) -> LocalFile:
        return _in_memory(RECIPE, self.recipe.to_json().encode())

    @property
    def items(self) -> tuple[LocalFile, ...]:
        """The files to push."""
        return (*self.files, self.recipe_file)

    def addressed(self, repo_id: str) -> "Contents":
        """Return what is pushed to a repository, whose id the card has wherever ours left a place for it."""
        named = rf"\g<1>{repo_id}".encode()
        files = (
            _with_content(f, _PLACES.sub(named, f.content)) if isinstance(f.content, bytes) else f for f in self.files
        )
        return replace(self, files=tuple(files))

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
    digests = {name: digest for name, digest in recipe.digests.items() if name != CARD}  # the user's to edit
    held_back = tuple(name for name in digests if recipe_only and is_weight(name))
    files = _read_files(folder, {name: digest for name, digest in digests.items() if name not in held_back})
    if not (folder / CARD).is_file():  # a former push's card would stay, and speak of other weights
        raise OutputError(
            f"{folder / CARD}: expected a card, got none. Restore it, write one, or perturb again with `overwrite`."
        )
    card = _in_memory(CARD, read_file(_inside(folder, CARD)))
    pushed = replace(_without_local_path(recipe), sha256={file.name: file.sha256 for file in files})
    left_out = tuple(name for name in list_names(folder) if name not in digests.keys() | {CARD, RECIPE})
    return Contents(pushed, (*files, card), recipe_only, held_back, left_out)


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


def _with_content(file: LocalFile, content: bytes) -> LocalFile:
    return file if content == file.content else _in_memory(file.name, content)


def _in_memory(name: str, content: bytes) -> LocalFile:
    return LocalFile(name, content, len(content), hex_of(digest_of_bytes(content, SHA256)))


def _read_files(folder: Path, recorded: Mapping[str, str]) -> list[LocalFile]:
    """Check files against the recipe, and take their sha256 from the same read."""
    paths = {name: _inside(folder, name).absolute() for name in recorded}
    for path in paths.values():
        if not path.is_file():
            raise OutputError(
                f"{path}: expected a file, as {RECIPE} names it, got none. "
                "Restore it, or perturb again with `overwrite`."
            )
    wanted = {path: {algorithm_of(recorded[name]), SHA256} for name, path in paths.items()}
    found = digests_of_all(wanted, "checking")
    for name, path in paths.items():
        _refuse_altered(path, found[path][algorithm_of(recorded[name])], recorded[name])
    return [LocalFile(name, path, path.stat().st_size, hex_of(found[path][SHA256])) for name, path in paths.items()]


def _refuse_altered(path: Path, digest: str, expected: str) -> None:
    if digest != expected:
        raise OutputError(
            f"{path}: expected {shorten(expected)}, as in {RECIPE}, got {shorten(digest)}: it was altered. "
            "Restore it, or perturb again with `overwrite`."
        )


def _without_local_path(recipe: Recipe) -> Recipe:
    """Return the recipe to push: of a local source and its links it names the folder or file alone."""
    if recipe.commit is not None:
        return recipe
    notes = tuple(re.sub(r"( is a link to )/.*/", r"\1", note) for note in recipe.notes)
    return replace(recipe, source=PurePath(recipe.source).name, notes=notes)
