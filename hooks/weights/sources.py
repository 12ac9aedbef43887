"""Where w_pre comes from: the model itself, a state_dict or a checkpoint, each read one tensor at a time."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from surgery.checkpoint.config_files import quantized
from surgery.checkpoint.pickles import DTYPES
from surgery.checkpoint.resolve import Checkpoint, resolve
from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile, open_weights
from surgery.errors import SourceError, some
from surgery.live.names import NEW, Names, find_names, own_weights, pretrained_parts
from surgery.progress import bar

from .peft_layers import find_copies
from .selection import Target
from .tracked import Tracked

_log = logging.getLogger(__name__)
_TORCH = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}

Source = str | Path | Mapping[str, torch.Tensor]


class Origin(Protocol):
    """Somewhere that pretrained values come from.

    Args:
        label: what to call it.
        fresh: live names of parameters that it has no value for.
        is_own: whether the values it yields are nobody else's, so that they need no copy.
    """

    label: str
    fresh: set[str]
    is_own: bool

    def read(self, targets: Sequence[Target]) -> Iterator[tuple[Target, torch.Tensor]]:
        """Yield each target with its values, of its shape, in any floating dtype. Keep no more than one."""
        ...


def open_origin(model: nn.Module, w_pre: Source | None) -> Origin:
    """Find where the pretrained values are.

    Raises:
        SourceError: `w_pre` cannot be used, or does not fit the model.
    """
    if w_pre is None:
        return _Live(model)
    if isinstance(w_pre, Mapping):
        return _StateDict(model, w_pre)
    if isinstance(w_pre, str | Path):
        return _Files(model, w_pre)
    raise SourceError(
        f"w_pre: expected a Hub id, a folder, a file or a state_dict, got {type(w_pre).__name__}. Give one of them."
    )


class _Live:
    """The weights that the model has now. New are those that transformers did not load, or the checkpoint lacks."""

    is_own = False

    def __init__(self, model: nn.Module) -> None:
        self.label = "the model's weights when it was patched"
        parameters = dict(model.named_parameters(remove_duplicate=False))
        pretrained = {name for name, parameter in parameters.items() if is_loaded(parameter)}
        parts = list(pretrained_parts(model))
        for path, part in parts:
            if not any(map(is_loaded, part.parameters())):  # deepcopy and fully_shard lose the marks
                pretrained |= {f"{path}.{name}".lstrip(".") for name in _in_checkpoint(part)}
        pretrained |= {copy for copy, original in find_copies(model).items() if original in pretrained}
        self.fresh = parameters.keys() - pretrained if pretrained else set()
        if parts and not pretrained:
            _log.warning(
                "%s: no checkpoint found, so every weight counts as pretrained. Name new layers in exclude.",
                type(model).__name__,
            )

    def read(self, targets: Sequence[Target]) -> Iterator[tuple[Target, torch.Tensor]]:
        return ((target, target.weight.detach()) for target in targets)


LOADED = "_is_surgery_loaded"
"""The mark of a parameter that `surgery run` has seen load_state_dict fill."""


_MARKS = "_is_hf_initialized", LOADED


def is_loaded(parameter: torch.Tensor) -> bool:
    """Tell whether a parameter bears the mark, transformers' or ours, of what was loaded from a checkpoint."""
    return any(hasattr(parameter, mark) for mark in _MARKS)


def move_marks(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    """Mark parameters as those of their names that they have replaced."""
    for name, w in before.items():
        for mark in _MARKS:
            if hasattr(w, mark) and not hasattr(after[name], mark):
                setattr(after[name], mark, getattr(w, mark))


def _in_checkpoint(part: nn.Module) -> set[str]:
    """Return the names of what the checkpoint that `part` was loaded from has, if it is on this machine."""
    names = find_names(part, None)
    if names.source == type(part).__name__:
        return set()
    new = {name for name, reason in names.copied.items() if reason == NEW}
    return names.tensors.keys() - new - {name for name, shape in names.converted.items() if shape is not None}


class Kept:
    """What a former patch of the model took: the weights have been trained since."""

    is_own = False

    def __init__(self, weights: Sequence[Tracked], fresh: set[str], label: str) -> None:
        self.label = label
        self.fresh = fresh
        self._weights = {id(tracked.weight): tracked for tracked in weights}

    def read(self, targets: Sequence[Target]) -> Iterator[tuple[Target, torch.Tensor]]:
        for target in targets:
            tracked = self._weights.get(id(target.weight))
            values = tracked.ready(target.weight).values if tracked else None
            if values is None:
                raise SourceError(
                    f"{target.name}: expected w_pre from the former patch_model, got none. "
                    "Name it in exclude if it is new, give w_pre, or call unpatch_model first to take what it is now."
                )
            yield target, values


class _StateDict:
    """A state_dict in memory: its names must be the model's, its shapes and dtypes those of the weights."""

    is_own = False

    def __init__(self, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
        self.label = "a state_dict"
        self._tensors = dict(state_dict)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        known = parameters.keys() | dict(model.named_buffers(remove_duplicate=False)).keys()
        unknown = [name for name in self._tensors if name not in known]
        if unknown:
            raise SourceError(
                f"w_pre: expected names of the model's tensors, such as {next(iter(parameters), '')!r}, got "
                f"{some([repr(name) for name in unknown])}. Rename or leave out {len(unknown)}, or give the checkpoint."
            )
        self.fresh = parameters.keys() - self._tensors.keys()

    def read(self, targets: Sequence[Target]) -> Iterator[tuple[Target, torch.Tensor]]:
        for target in targets:
            name = next(name for name in target.names if name in self._tensors)
            values, w = self._tensors[name], target.weight
            if not isinstance(values, torch.Tensor):
                raise SourceError(f"w_pre: {name}: expected a tensor, got {type(values).__name__}. Give a state_dict.")
            _refuse_other_shape(name, w, values.shape)
            if values.dtype != w.dtype:
                raise SourceError(
                    f"w_pre: {name}: expected {w.dtype}, got {values.dtype}. Cast it with .to({w.dtype})."
                )
            if values.is_meta:
                raise SourceError(f"w_pre: {name}: expected values, got a tensor on the meta device. Load it first.")
            yield target, values


class _Files:
    """A checkpoint: names are mapped as transformers does, and values cast as from_pretrained does."""

    is_own = True

    def __init__(self, model: nn.Module, source: str | Path) -> None:
        checkpoint = resolve(source)
        for config, method in quantized(checkpoint).items():
            raise SourceError(
                f"w_pre: {checkpoint.path(config)}: expected unquantized weights, got quantization_config ({method}). "
                "Give the checkpoint it was made from."
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
        with bar(sum(target.weight.nbytes for target in targets), "w_pre") as advance:
            for written, values in _stream(self._checkpoint, wanted.keys()):
                for target in wanted.pop(written):
                    yield target, values
                    advance(target.weight.nbytes)

    def _written(self, target: Target) -> str:
        """Return the name of the target's values in the checkpoint."""
        for name in target.names:
            if name not in self._names.converted and name not in self._names.copied:
                return self._names.canonical[name]
        shape = self._names.converted[target.name]
        got = f"{shape}" if shape is not None else "one that transformers makes from others when it loads them"
        raise SourceError(
            f"w_pre: {target.name}: expected shape {tuple(target.weight.shape)}, got {got}. "
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
                    yield tensor.name, _read(file, tensor, checkpoint.path(file_name))
            file.refuse_changed()
        finally:
            file.close()
    if names:
        raise SourceError(f"w_pre: {some(sorted(names))}: expected in {checkpoint.id}, got none. Fetch it again.")


def _read(file: WeightFile, tensor: Tensor, path: Path) -> torch.Tensor:
    if tensor.dtype not in _TORCH:
        raise SourceError(f"w_pre: {tensor.name}: expected floating point, got {tensor.dtype} in {path}. Exclude it.")
    values = torch.empty(tensor.shape, dtype=_TORCH[tensor.dtype])
    file.read_into(tensor, 0, memoryview(values.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return values


def _refuse_other_shape(name: str, w: torch.Tensor, shape: torch.Size) -> None:
    if shape != w.shape:
        raise SourceError(
            f"w_pre: {name}: expected shape {tuple(w.shape)}, got {tuple(shape)}. Give the checkpoint it was trained "
            "from, or name it in exclude."
        )
