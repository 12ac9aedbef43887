"""w_pre read from a checkpoint, one tensor at a time, by the names that transformers would give its tensors."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from surgery.checkpoint.config_files import quantized
from surgery.checkpoint.pickles import DTYPES
from surgery.checkpoint.resolve import Checkpoint, resolve
from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile, open_weights
from surgery.errors import SourceError, some
from surgery.live.names import Names, find_names, own_weights
from surgery.live.parts import NEW
from surgery.live.zero3 import shape_of
from surgery.progress import bar

from .pretrained import local
from .target import Target

_TORCH = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}


class Files:
    """A checkpoint: names are mapped as transformers does, and values cast as from_pretrained does."""

    is_own = True

    def __init__(self, model: nn.Module, source: str | Path) -> None:
        checkpoint = resolve(source)
        for config, settings in quantized(checkpoint).items():
            raise SourceError(
                f"w_pre: {checkpoint.label(config)}: expected unquantized weights, got quantization_config "
                f"({settings['quant_method']}). Give the checkpoint it was made from."
            )
        self.label = checkpoint.id
        self._checkpoint = checkpoint
        try:
            self._names: Names = find_names(model, checkpoint)
        except SourceError as error:
            raise SourceError(str(error).replace("source:", "w_pre:", 1)) from error
        self.fresh = {name for name, reason in self._names.copied.items() if reason == NEW}

    def read(self, targets: Sequence[Target]) -> Iterator[tuple[Target, torch.Tensor]]:
        wanted: dict[str, list[Target]] = {}
        for target in targets:
            wanted.setdefault(self._written(target), []).append(target)
        with bar(sum(local(target.weight).nbytes for target in targets), "w_pre") as advance:
            for written, values in _stream(self._checkpoint, wanted.keys()):
                for target in wanted.pop(written):
                    yield target, values
                    advance(local(target.weight).nbytes)

    def _written(self, target: Target) -> str:
        """Return the name of the target's values in the checkpoint."""
        for name in target.names:
            if name not in self._names.converted and name not in self._names.copied:
                return self._names.canonical[name]
        shape = self._names.converted[target.name]
        got = f"{shape}" if shape is not None else "one that transformers makes from others when it loads them"
        raise SourceError(
            f"w_pre: {target.name}: expected shape {tuple(shape_of(target.weight))}, got {got}. "
            f"Name it in exclude, or give a state_dict."
        )


def _stream(checkpoint: Checkpoint, wanted: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the wanted tensors of a checkpoint by name, one in memory at a time."""
    names = set(wanted)
    for file_name in (name for weights in own_weights(checkpoint) for name in weights.files):
        file = open_weights(checkpoint, file_name)
        try:
            for tensor in file.header.tensors:
                if tensor.name in names:
                    names.remove(tensor.name)
                    yield tensor.name, _read(file, tensor, checkpoint.label(file_name))
            file.refuse_changed()
        finally:
            file.close()
    if names:
        raise SourceError(f"w_pre: {some(sorted(names))}: expected in {checkpoint.id}, got none. Fetch it again.")


def _read(file: WeightFile, tensor: Tensor, path: str) -> torch.Tensor:
    if tensor.dtype not in _TORCH:
        raise SourceError(f"w_pre: {tensor.name}: expected floating point, got {tensor.dtype} in {path}. Exclude it.")
    values = torch.empty(tensor.shape, dtype=_TORCH[tensor.dtype])
    file.read_into(tensor, 0, memoryview(values.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return values


def names_in_checkpoint(part: nn.Module) -> set[str]:
    """Return the names of what the checkpoint that `part` was loaded from has, if it is on this machine."""
    names = find_names(part, None)
    if names.source == type(part).__name__:
        return set()
    new = {name for name, reason in names.copied.items() if reason == NEW}
    return names.tensors.keys() - new - {name for name, shape in names.converted.items() if shape is not None}
