"""Names of files as a listing of the Hub or of a store gives them, of which none may lead out of the checkpoint."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from surgery.errors import SourceError


def refuse_escaping(what: str, names: Iterable[str]) -> None:
    """Refuse a checkpoint with names that lead out of its folder, or that are none.

    Raises:
        SourceError: it has one.
    """
    for name in names:
        is_name = isinstance(name, str) and name
        if not is_name or ".." in PurePosixPath(name).parts or name.startswith("/") or set("\\\0") & set(name):
            raise SourceError(f"{what}: expected files of its own, got {name!r}. Do not trust this checkpoint.")
