"""Symbolic links in a checkpoint's folder: followed where a listing of the folder found them, as shards on another
disk are; refused where a name from a file, which others wrote, leads out of the folder."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from surgery.errors import SourceError
from surgery.files import kind_of_mode


def find_links(root: Path, names: Sequence[str], *, listed: Collection[str]) -> dict[str, str]:
    """Return the files that are links out of the checkpoint, and where they lead, by name.

    Args:
        listed: names that a listing of the folder found; no link among the others may lead out of it.
    Raises:
        SourceError: such a link, a link to nothing or to a folder, another kind of file.
    """
    links = {}
    for name in names:
        path = root / name
        real = Path(os.path.realpath(path))  # Path.resolve fails for a link to itself
        is_out = not any(real.is_relative_to(folder.resolve()) for folder in _own_folders(root))
        if is_out and name not in listed:
            raise SourceError(f"{path}: expected a file of the checkpoint, got a link out of it. Replace it by a copy.")
        _refuse_no_file(path, real)
        if is_out:
            links[name] = str(real)
    return links


def _own_folders(root: Path) -> list[Path]:
    """Return where a checkpoint's files may lie: its folder and, for one in the Hub's cache, that of its blobs."""
    if root.parent.name != "snapshots":
        return [root]
    model = root.parent.parent
    return [root, model / "blobs", model.parent / "blobs"]  # the latter are shared between models


def _refuse_no_file(path: Path, real: Path) -> None:
    if not real.is_file():
        kind = "a linked folder" if real.is_dir() else kind_of_mode(real.stat().st_mode) if real.exists() else None
        found = kind or "a link to nothing"
        raise SourceError(f"{path}: expected a file, got {found}. Remove it, or replace it by a copy.")
