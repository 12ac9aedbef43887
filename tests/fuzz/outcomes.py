"""What a reader may do with a mutated file: read it, or refuse it in one line. Anything else is a finding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from surgery.errors import SourceError


class FindingError(Exception):
    """What should not happen, in one line."""


@dataclass(frozen=True)
class Refused:
    """A reader's error."""

    message: str


class Kind(Protocol):
    """Files of one kind: mutated, read by surgery, and read by another to compare."""

    def __init__(self, folder: Path) -> None: ...

    def write(self, r: Random) -> None:
        """Write a case."""

    def read(self) -> Any:
        """Read it with surgery."""

    def judge(self, ours: Any) -> str:
        """Say in a few words what came of it, given what `read` returned, or Refused. Raises FindingError."""


def attempt(read: Callable[[], Any]) -> Any:
    """Return what was read, or Refused."""
    try:
        return read()
    except SourceError as error:
        message = str(error)
    if "\n" in message or not 10 < len(message) < 20_000:
        raise FindingError(f"an error that is no line: {message[:200]!r}")
    return Refused(message)


def stricter(refused: Refused, rules: Mapping[str, str]) -> str:
    """Name the rule by which surgery refuses what another reads."""
    for rule, message in rules.items():
        if message in refused.message:
            return f"stricter: {rule}"
    raise FindingError(f"refused what its oracle reads: {refused.message[:300]!r}")


def same(ours: Any, theirs: Any) -> None:
    """Compare what the two read, by name."""
    if ours != theirs:
        names = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
        pairs = "; ".join(f"{name!r}: {ours.get(name)!r:.100} for {theirs.get(name)!r:.100}" for name in names[:2])
        raise FindingError(f"read something else than its oracle: {pairs}")
