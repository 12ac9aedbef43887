"""The storages of a file of torch before 1.6, a row of pickles: one refers to storages, and the last lists them.

torch.load reads the storages that are listed. One that is only referred to keeps what was in memory before.
"""

import pickle
from pathlib import Path
from typing import Any

from surgery.errors import SourceError
from surgery.files import open_file

_BEFORE = 3  # pickles: a number that marks the format, its version, and sizes of C's types


class _Nothing(dict[Any, Any]):
    """Stands for every class and function that a pickle names: none is imported or called."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None:
        pass


class _Storages(pickle.Unpickler):
    """Takes down the keys of the storages that a pickle refers to."""

    keys: set[str]

    def find_class(self, *_: str) -> type[_Nothing]:
        return _Nothing

    def persistent_load(self, reference: Any) -> _Nothing:
        self.keys.add(reference[2])
        return _Nothing()


def _unlisted(path: Path) -> set[str]:
    with open_file(path) as file:
        for _ in range(_BEFORE):
            _Storages(file).load()
        referring = _Storages(file)
        referring.keys = set()
        referring.load()
        return referring.keys - set(_Storages(file).load())


def refuse_unlisted(path: Path, label: str) -> None:
    """Refuse a file that refers to storages that it does not bring along.

    Raises:
        SourceError: it does, or its pickles are damaged.
    """
    try:
        unlisted = _unlisted(path)
    except OSError:
        raise
    except Exception as error:  # torch's own unpickler overlooks some damage
        raise SourceError(
            f"{label}: expected pickles as torch before 1.6 wrote them, got a damaged one. Fetch it again."
        ) from error
    if unlisted:
        raise SourceError(
            f"{label}: expected a PyTorch checkpoint with the bytes of all its tensors, got one without "
            f"{len(unlisted)} of its storages. Fetch it again."
        )
