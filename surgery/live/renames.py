"""Checkpoint names sent through transformers' key renaming, to learn which live parameter each is loaded into.

transformers renames while loading, and may fuse, split or transpose. Every name in the checkpoint is sent through its
own machinery, and only a tensor that arrives alone under one name, in its shape, is a counterpart.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.live.zero3 import shape_of
from surgery.roles import Role

_Rename = Callable[[str], tuple[str, list[str]]]
"""A checkpoint's name to the live one, and the live names of what a converter makes of it, if one does."""


@dataclass(frozen=True)
class CheckpointNames:
    """What a checkpoint's headers say.

    Args:
        written: every name, and the one that `surgery perturb` writes it under: another for what a pickle holds twice.
        shapes, dtypes, roles: by written name.
        repeating: written names that the class ties to others.
        is_perturbed: `surgery perturb` wrote it.
    """

    id: str
    commit: str | None
    written: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    roles: dict[str, Role] = field(default_factory=dict)
    repeating: frozenset[str] = frozenset()
    is_perturbed: bool = False


@dataclass
class Counterparts:
    """Where live tensors come from, by live name.

    Args:
        canonical: the written name of each that has one.
        converted: those made of what is fused, split or resized; the checkpoint's shape if only that differs.
    """

    canonical: dict[str, str] = field(default_factory=dict)
    converted: dict[str, tuple[int, ...] | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.canonical) + len(self.converted)


def match_names(part: Any, tensors: Mapping[str, torch.Tensor], checkpoint: CheckpointNames) -> Counterparts:
    """Send every name of the checkpoint forward; of several ways to do so, take the one that reaches most tensors.

    The ways: with what the model was loaded with; with what transformers would load it with now; by plain rules. All
    but the last use what is private to transformers and differs between its versions, so they may be missing.

    Args:
        part: the model that the checkpoint belongs to.
        tensors: its parameters and buffers by live name.
    """
    prefix = getattr(part, "base_model_prefix", "") or None
    found = []
    for conversions in _conversions(part):
        try:
            found.append(_match(_with_transformers(conversions, prefix, tensors), tensors, checkpoint))
        except (ImportError, AttributeError, TypeError):
            continue
    if hasattr(part, "_get_key_renaming_mapping"):
        found.append(_match(_with_transformers_4(part, prefix, checkpoint.written), tensors, checkpoint))
    found.append(_match(lambda name: (_plain(name, prefix, tensors), []), tensors, checkpoint))
    return max(found, key=len)


def _match(rename: _Rename, tensors: Mapping[str, torch.Tensor], checkpoint: CheckpointNames) -> Counterparts:
    found = Counterparts()
    for name in sorted(checkpoint.written, key=_natural):
        live, made = rename(name)
        if made:
            found.converted |= {target: None for target in made if target in tensors}
        elif live in tensors:
            written = checkpoint.written[name]
            if tuple(shape_of(tensors[live])) == checkpoint.shapes[written]:
                found.canonical.setdefault(live, written)
            else:
                found.converted[live] = checkpoint.shapes[written]
    found.canonical = {live: name for live, name in found.canonical.items() if live not in found.converted}
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort as transformers does, numbers by value: some of its renamings depend on what came before."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _conversions(part: Any) -> Iterable[list[Any]]:
    if (used := getattr(part, "_weight_conversions", None)) is not None:
        yield deepcopy(list(used))
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        yield get_model_conversion_mapping(part)
    except (ImportError, AttributeError, TypeError):
        return


def _with_transformers(conversions: list[Any], prefix: str | None, tensors: Mapping[str, torch.Tensor]) -> _Rename:
    """Rename as core_model_loading.convert_and_load_state_dict_in_model does."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = dict(tensors)

    def rename(name: str) -> tuple[str, list[str]]:
        live, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if live not in state and name in state:
            live, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is None:
            return live, []
        targets = next(entry for entry in converters if pattern in entry.source_patterns).target_patterns
        return live, [live.replace(targets[0], target) for target in targets]

    return rename


def _with_transformers_4(part: Any, prefix: str | None, names: Iterable[str]) -> _Rename:
    """Rename as _load_pretrained_model of transformers 4 does; nothing where it would refuse to load."""
    names = list(names)
    is_prefixed = any(name.startswith(prefix) for name in names) if prefix else False
    is_expected = hasattr(part, prefix) if prefix else False
    ways = (is_prefixed and not is_expected, is_expected and not is_prefixed)
    try:
        live = part._get_key_renaming_mapping(names, part._checkpoint_conversion_mapping, *ways)
    except ValueError:
        live = {}
    return lambda name: (live.get(name, ""), [])


def _plain(name: str, prefix: str | None, tensors: Mapping[str, torch.Tensor]) -> str:
    """Rename by the base model's prefix, added or stripped, and the old names of LayerNorm's weight and bias."""
    modern = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    for candidate in (name, modern):
        for live in (candidate, candidate.removeprefix(f"{prefix}."), f"{prefix}.{candidate}"):
            if live in tensors:
                return live
    return name
