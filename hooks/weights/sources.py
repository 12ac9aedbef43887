"""Where w_pre comes from: the model itself, a state_dict or a checkpoint, each read one tensor at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from surgery.errors import SourceError, some
from surgery.escapes import get_logger
from surgery.live.parts import pretrained_parts
from surgery.live.zero3 import shape_of

from .peft_layers import find_copies
from .pretrained import values_of
from .target import Target
from .tracked import Tracked

_log = get_logger(__name__)

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
        from .checkpoint_source import Files  # most patches read no file

        return Files(model, w_pre)
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
                from .checkpoint_source import names_in_checkpoint

                pretrained |= {f"{path}.{name}".lstrip(".") for name in names_in_checkpoint(part)}
        pretrained |= {copy for copy, original in find_copies(model).items() if original in pretrained}
        self.fresh = parameters.keys() - pretrained if pretrained else set()
        if parts and not pretrained:
            _log.warning(
                "%s: no checkpoint found, so every weight counts as pretrained. Name new layers in exclude.",
                type(model).__name__,
            )

    def read(self, targets: Sequence[Target]) -> Iterator[tuple[Target, torch.Tensor]]:
        return ((target, values_of(target.weight)) for target in targets)


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


def _refuse_other_shape(name: str, w: torch.Tensor, shape: torch.Size) -> None:
    if shape != shape_of(w):
        raise SourceError(
            f"w_pre: {name}: expected shape {tuple(shape_of(w))}, got {tuple(shape)}. Give the checkpoint it was "
            "trained from, or name it in exclude."
        )
