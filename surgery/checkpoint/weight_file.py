"""An open weight file as a Protocol, for safetensors and pickles alike; a new format is opened here."""

from pathlib import Path
from typing import Protocol

from surgery.checkpoint.resolve import Checkpoint
from surgery.checkpoint.tensorfile import Header, Tensor, TensorFile
from surgery.errors import SourceError


class WeightFile(Protocol):
    """What TensorFile and PickleFile have in common.

    Args:
        header: of the file, or of the safetensors file to write in its place.
        tied: names that repeat another tensor, and that tensor's name.
    """

    header: Header
    tied: dict[str, str]

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None: ...
    def sha256(self) -> str | None: ...
    def settle(self, sha256: str) -> None: ...
    def refuse_changed(self) -> None: ...
    def close(self) -> None: ...


def open_weights(checkpoint: Checkpoint, name: str) -> WeightFile:
    """Open one weight file of a checkpoint to read.

    Raises:
        SourceError: it cannot be read, is malformed, or is not the file any more that was found.
    """
    path = checkpoint.path(name)
    try:
        checkpoint.refuse_changed(name)
        file = _open(path, checkpoint.key)
    except OSError as error:
        raise SourceError(f"{path}: expected a file to read, got {error.strerror}. Check its permissions.") from error
    try:
        checkpoint.refuse_changed(name)  # it may have been replaced between the two
    except SourceError:
        file.close()
        raise
    return file


def _open(path: Path, key: str | None) -> WeightFile:
    if path.suffix == ".safetensors":
        return TensorFile(path, label=str(path))
    from surgery.checkpoint.pickles import PickleFile  # takes torch

    return PickleFile(path, label=str(path), key=key)
