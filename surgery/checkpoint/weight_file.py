"""An open weight file as a Protocol, whatever its format and its number of files; a new format is opened here."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from surgery.checkpoint.config_files import block_size
from surgery.checkpoint.descriptors import Descriptor
from surgery.checkpoint.digests import algorithm_of, digest_of_list, digests_of_all
from surgery.checkpoint.layout import METADATA
from surgery.checkpoint.resolve import Checkpoint
from surgery.checkpoint.tensorfile import Header, Tensor, TensorFile
from surgery.errors import SourceError
from surgery.io_errors import advice, cause


class WeightFile(Protocol):
    """What the readers of all formats have in common.

    Args:
        header: of the file, or of the safetensors file to write in its place.
        tied: names that repeat another tensor, and that tensor's name.
        descriptor: of the file, if all tensors' bytes are in it where `begin` and `end` say.
    """

    header: Header
    tied: dict[str, str]

    @property
    def descriptor(self) -> Descriptor | None: ...

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None: ...
    def digest(self, algorithm: str) -> str | None: ...
    def settle(self, digest: str) -> None: ...
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
        paths = [checkpoint.path(part) for part in checkpoint.parts(name)]
        file = (
            _open_dequantized(checkpoint, name)
            if checkpoint.dequantize
            else _open(paths, checkpoint.key, checkpoint.repeating.get(name, ()))
        )
    except OSError as error:
        raise SourceError(
            f"{error.filename or path}: expected a file to read, got {cause(error)}. {advice(error)}"
        ) from error
    try:
        checkpoint.refuse_changed(name)  # it may have been replaced between the two
    except SourceError:
        file.close()
        raise
    return file


def _open(paths: Sequence[Path], key: str | None, repeating: Collection[str]) -> WeightFile:
    path = paths[0]
    if path.suffix == ".safetensors":
        return TensorFile(path, label=str(path))
    if path.name == METADATA:
        from surgery.checkpoint.distributed import DistributedFile  # takes torch

        return DistributedFile(paths, key=key)
    if len(paths) > 1:
        from surgery.checkpoint.consolidated import ConsolidatedFile  # takes torch

        return ConsolidatedFile(paths, key=key)
    from surgery.checkpoint.pickles import PickleFile  # takes torch

    return PickleFile(path, label=str(path), key=key, repeating=repeating)


def _open_dequantized(checkpoint: Checkpoint, name: str) -> WeightFile:
    from surgery.checkpoint.dequantized import DequantizedFile

    weight_set = next(one for one in checkpoint.layout.weights if name in one.files)
    others = [checkpoint.path(file) for file in weight_set.files if file != name]
    return DequantizedFile(checkpoint.path(name), others, block=block_size(checkpoint, weight_set.folder))


def digests_of_sources(checkpoint: Checkpoint, recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the digest that identifies each weight file, by name: its own, or one of all files it is made up of.

    Args:
        recorded: what to compare them with, by name; each is computed with the algorithm of that.
    """
    parts = {name: [checkpoint.path(part) for part in checkpoint.parts(name)] for name in recorded}
    algorithms = {name: algorithm_of(digest) for name, digest in recorded.items()}
    wanted = {path: [algorithms[name]] for name, paths in parts.items() for path in paths}
    found = digests_of_all(wanted, "checking the source")
    return {
        name: digest_of_list({path: found[path][algorithms[name]] for path in paths}) for name, paths in parts.items()
    }
