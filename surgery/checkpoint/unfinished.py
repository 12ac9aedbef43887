"""A folder that a run of ours has left unfinished: its journal is there."""

from pathlib import Path

from surgery.checkpoint.layout import JOURNAL
from surgery.errors import SourceError


def refuse_unfinished(root: Path) -> None:
    """Refuse a folder that a run of ours has left unfinished.

    Raises:
        SourceError: it has.
    """
    if (root / JOURNAL).exists():
        raise unfinished(str(root))


def unfinished(what: str) -> SourceError:
    """Return the error of a folder with a journal of ours."""
    return SourceError(
        f"{what}: expected a finished checkpoint, got one that `surgery perturb` did not finish. "
        f"{JOURNAL} there has the command that finishes it."
    )
