"""The exceptions that surgery raises on purpose, one line each: `<what>: expected X, got Y. <What to do>.`

An option is named as in Python and between backticks, `create_pr`: the command line writes --create-pr for it.
"""

from collections.abc import Iterable, Sequence

from surgery.escapes import printable


class SurgeryError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one line and exits 1."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class SettingError(SurgeryError):
    """A setting is out of range, or cannot take effect on this checkpoint."""


class SourceError(SurgeryError):
    """The checkpoint is missing, malformed, unsafe or of a kind that cannot be perturbed."""


class NoWeightsError(SourceError):
    """The files are there, but none of them holds weights."""


class OutputError(SurgeryError):
    """The output folder cannot be used, or writing to it failed."""


def by_reason(reasons: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group names by the reason that each is given with, in the order in which the reasons first come."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons:
        groups.setdefault(reason, []).append(name)
    return groups


def some(names: Sequence[str]) -> str:
    """Name the first two of many."""
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
