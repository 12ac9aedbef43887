"""An open weight file as a Protocol, whatever its format and its number of files; a new format is opened here."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from surgery.checkpoint.config_files import block_size
from surgery.checkpoint.descriptors import Descriptor
from surgery.checkpoint.digests import algorithm_of, digest_of_list, digests_of_all
from surgery.checkpoint.layout import METADATA
from surgery.checkpoint.resolve import Checkpoint
from surgery.checkpoint.tensorfile import Header, Tensor, TensorFile
from surgery.errors import SourceError
from surgery.io_errors import advice, cause

REQUESTS = 8
"""To a store at once, at least."""


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


@runtime_checkable
class RangeReader(WeightFile, Protocol):
    """One on a store, where each read is a request."""

    def read_at(self, position: int, buffer: memoryview) -> None: ...


def open_weights(checkpoint: Checkpoint, name: str) -> WeightFile:
    """Open one weight file of a checkpoint to read.

    Raises:
        SourceError: it cannot be read, is malformed, or is not the file any more that was found.
    """
    if checkpoint.remote:  # the file is looked at when it is settled
        from surgery.checkpoint.remote_file import RemoteFile

        return RemoteFile(checkpoint.remote, name, label=checkpoint.label(name))
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


def open_safetensors(checkpoint: Checkpoint, name: str) -> WeightFile:
    """Open a safetensors file, named in errors as the checkpoint names it. Raises SourceError and OSError."""
    if checkpoint.remote:
        from surgery.checkpoint.remote_file import RemoteFile

        return RemoteFile(checkpoint.remote, name, label=name)
    return TensorFile(checkpoint.path(name), label=name)


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


def reading_workers(usual: int, *checkpoints: Checkpoint) -> int:
    """Return how many threads to read with: as usual, or of a store as many as there are to be requests at once."""
    return max(usual, REQUESTS) if any(checkpoint.remote for checkpoint in checkpoints) else usual


def read_runs(file: WeightFile, runs: Iterable[tuple[Tensor, int, memoryview]], whole: memoryview) -> None:
    """Read runs of tensors that follow one another in a file, and are the parts of `whole`; from a store at once.

    Args:
        runs: tensor, where in it the run begins, and the buffer to fill.
    """
    runs = list(runs)
    if isinstance(file, RangeReader):
        tensor, start, _ = runs[0]
        file.read_at(tensor.begin + start, whole)
        return
    for tensor, start, buffer in runs:
        file.read_into(tensor, start, buffer)


def digests_of_sources(checkpoint: Checkpoint, recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the digest that identifies each weight file, by name: its own, or one of all files it is made up of.

    Args:
        recorded: what to compare them with, by name; each is computed with the algorithm of that.
    """
    if checkpoint.remote:
        from surgery.checkpoint.remote_digests import digests_of_remote

        return digests_of_remote(checkpoint.remote, recorded)
    parts = {name: [checkpoint.path(part) for part in checkpoint.parts(name)] for name in recorded}
    algorithms = {name: algorithm_of(digest) for name, digest in recorded.items()}
    wanted = {path: [algorithms[name]] for name, paths in parts.items() for path in paths}
    found = digests_of_all(wanted, "checking the source")
    return {
        name: digest_of_list({path: found[path][algorithms[name]] for path in paths}) for name, paths in parts.items()
    }
