"""From a live model's parameters to the names that its checkpoint has for them: noise is drawn for those names.

The checkpoint is the one that the model was loaded from. A model of one's own may hold several pretrained parts, each
with a checkpoint; what is in none of them is new.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.layout import RECIPE, WeightSet
from surgery.checkpoint.pickles import DTYPES
from surgery.checkpoint.resolve import Checkpoint, resolve
from surgery.checkpoint.roles import find_roles, read_model_type
from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import open_weights
from surgery.errors import SourceError
from surgery.live.parts import LIVE_NAMES, NEW, pretrained_parts, unwrap
from surgery.live.renames import CheckpointNames, Counterparts, match_names
from surgery.recipe import PERTURBED
from surgery.roles import BUFFER, CLASS, Role

_WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module)\.")
_PEFT = re.compile(
    r"\.(?:token_adapter|base_layer|original_module|modules_to_save\.[^.]+|ln_tuning_layers\.[^.]+)(?=\.)"
)


@dataclass(frozen=True)
class Names:
    """A model's tensors and their canonical names.

    Args:
        source: the checkpoint's id, or the model's class where there is none.
        tensors: parameters and persistent buffers by live name; a tied tensor under each of its names.
        canonical: the name to draw noise for, by live name.
        copied: why a tensor is left as it is, by live name.
        roles: what each tensor is, by live name: its module's word, and the checkpoint's for what that holds.
        notes: what could not be mapped, in sentences.
        converted: live names of what has no counterpart of its shape; the checkpoint's shape where only that differs.
        repeating: canonical names that a class ties to others.
    """

    source: str
    commit: str | None
    tensors: dict[str, torch.Tensor]
    canonical: dict[str, str]
    copied: dict[str, str]
    roles: dict[str, Role]
    notes: tuple[str, ...] = ()
    converted: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    repeating: frozenset[str] = frozenset()


def find_names(model: torch.nn.Module, source: str | Path | Checkpoint | None) -> Names:
    """Find the canonical names of a model's parameters and persistent buffers. Reads headers only.

    Args:
        source: the checkpoint; default: what each pretrained part of the model was loaded from, if it is on this
            machine. Only a `source` that is given may be fetched from the Hub.
    Raises:
        SourceError: `source` cannot be used, or names nothing in the model.
    """
    model = unwrap(model)
    tensors, buffers = _tensors(model)
    what = type(model).__name__
    parts = list(pretrained_parts(model))
    roles = {name: Role(name in buffers, CLASS) for name in tensors}
    names = Names(what, None, tensors, {name: name for name in tensors}, dict.fromkeys(buffers, BUFFER), roles)
    notes: list[str] = []
    read: list[CheckpointNames] = []
    mapped: set[str] = set()
    for path, part in _choose_parts(model, parts, source):
        checkpoint = _read_names(_resolve(source)) if source else _local_names(part)
        members = {name: _inner(name, path) for name in tensors if not path or name.startswith(f"{path}.")}
        inside = {inner: tensors[name] for name, inner in members.items()}
        found = match_names(part, inside, checkpoint) if checkpoint else None
        mapped |= members.keys()
        if checkpoint is None or not found:
            notes.append(_no_checkpoint(part, checkpoint, is_given=source is not None))
            continue
        read.append(checkpoint)
        notes += [*_apply(found, members, names, checkpoint), *([PERTURBED] if checkpoint.is_perturbed else [])]
    if not read:
        notes = notes or [_no_checkpoint(model, None, is_given=False)]
        return replace(names, notes=tuple(notes))
    names.copied.update({name: NEW for name in tensors if name not in mapped and name not in buffers})
    ids = ", ".join(dict.fromkeys(checkpoint.id for checkpoint in read))
    commit = read[0].commit if len(read) == 1 else None
    repeating = frozenset(name for checkpoint in read for name in checkpoint.repeating)
    return replace(names, source=ids, commit=commit, notes=tuple(notes), repeating=repeating)


# -- the live side ------------------------------------------------------------------------------------------------


def _tensors(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return what state_dict would hold, by name, and which of these are buffers."""
    transient = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in transient}
    return tensors | buffers, set(buffers)


def _choose_parts(
    model: torch.nn.Module, parts: list[tuple[str, Any]], source: str | Path | Checkpoint | None
) -> list[tuple[str, Any]]:
    if source is None:
        return parts
    if len(parts) > 1:
        names = ", ".join(path for path, _ in parts[:3])
        raise SourceError(
            f"source: expected a model with one pretrained part, got {len(parts)} ({names}). Take them one at a time."
        )
    return parts or [("", model)]


def _inner(name: str, path: str) -> str:
    """Strip what wrappers add to a name: the path to the pretrained part, and the parts of torch.compile and PEFT."""
    inner = name.removeprefix(f"{path}.") if path else name
    return _PEFT.sub("", _WRAPPED.sub("", inner))


def _apply(found: Counterparts, members: Mapping[str, str], names: Names, checkpoint: CheckpointNames) -> list[str]:
    """Enter what was found for one part of the model, and return notes on the rest."""
    converted, cast = [], []
    for name, inner in members.items():
        if inner in found.canonical:
            names.canonical[name] = written = found.canonical[inner]
            if checkpoint.roles[written].is_buffer or not names.roles[name].is_buffer:
                names.roles[name] = checkpoint.roles[written]  # the choice that `surgery perturb` makes
            if name not in names.copied and DTYPES.get(names.tensors[name].dtype) != checkpoint.dtypes[written]:
                cast.append(name)
        elif name in names.copied:
            continue
        elif inner in found.converted:
            converted.append(name)
            names.converted[name] = found.converted[inner]
        else:
            names.copied[name] = NEW
    faults = {
        f"have no counterpart of their shape in {checkpoint.id}: perturbed under {LIVE_NAMES}": converted,
        f"have another dtype than in {checkpoint.id}: the same noise, rounded otherwise": cast,
    }
    return [f"{len(faulty)} tensors ({_few(faulty)}) {fault}" for fault, faulty in faults.items() if faulty]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _no_checkpoint(part: Any, checkpoint: CheckpointNames | None, *, is_given: bool) -> str:
    if checkpoint is None:
        return f"no checkpoint found for {type(part).__name__}: {LIVE_NAMES} were used"
    fault = f"expected names of {type(part).__name__}, got none in {checkpoint.id}"
    if is_given:
        raise SourceError(f"source: {fault}. Name the checkpoint that the model was loaded from.")
    return f"{fault}: {LIVE_NAMES} were used"


# -- the checkpoint side ------------------------------------------------------------------------------------------


def _resolve(source: str | Path | Checkpoint) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else resolve(source)


def own_weights(checkpoint: Checkpoint) -> list[WeightSet]:
    """Return a checkpoint's own weights, not those of the components in its folders.

    Raises:
        SourceError: it has none of its own, and several components.
    """
    sets = checkpoint.layout.weights
    chosen = [weights for weights in sets if weights.folder == ""] or list(sets)
    if len({weights.folder for weights in chosen}) > 1:
        folders = ", ".join(sorted({weights.folder for weights in chosen})[:3])
        raise SourceError(f"{checkpoint.id}: expected one model, got several ({folders}). Point at the folder of one.")
    return chosen


def _read_names(checkpoint: Checkpoint) -> CheckpointNames:
    """Read the headers of a checkpoint's own weights."""
    chosen = own_weights(checkpoint)
    tensors: list[Tensor] = []
    written: dict[str, str] = {}
    for name in (name for weights in chosen for name in weights.files):
        file = open_weights(checkpoint, name)
        file.close()
        tensors += file.header.tensors
        written |= {tensor.name: tensor.name for tensor in file.header.tensors} | file.tied
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    model_type = read_model_type(checkpoint, chosen[0].folder)
    return CheckpointNames(
        checkpoint.id,
        checkpoint.commit,
        written,
        shapes,
        dtypes={tensor.name: tensor.dtype for tensor in tensors},
        roles=find_roles(shapes, model_type),
        repeating=frozenset(model_type.find_ties(shapes) if model_type and model_type.is_tied else ()),
        is_perturbed=checkpoint.holds(RECIPE),
    )


def _local_names(part: Any) -> CheckpointNames | None:
    """Read the names of what a model was loaded from, if that is in a folder or in the Hub's cache."""
    config = getattr(part, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    try:
        if Path(name).exists():
            return _read_names(resolve(Path(name)))
        from huggingface_hub import snapshot_download

        commit = getattr(config, "_commit_hash", None)
        folder = Path(snapshot_download(name, revision=commit, local_files_only=True))
        found = _read_names(resolve(folder))
        return replace(found, id=name, commit=folder.name)
    except (SourceError, OSError, ValueError):  # the Hub's "not in the cache" and "not a repository's name" among them
        return None
