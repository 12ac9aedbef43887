"""Wrappers around a live model, and its pretrained parts; nothing of a checkpoint, so that it is imported fast."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from surgery.live.foreign import is_engine

NEW = "new: not in the checkpoint"
LIVE_NAMES = "the names in the model"
"""Is in each note that tells of noise which `surgery perturb` does not repeat."""


def unwrap(model: Any) -> Any:
    """Take off torch.compile, DataParallel, DistributedDataParallel and DeepSpeed's engine."""
    while hasattr(model, "_orig_mod") or isinstance(model, DataParallel | DistributedDataParallel) or is_engine(model):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def pretrained_parts(model: torch.nn.Module) -> Iterable[tuple[str, Any]]:
    """Yield the outermost modules that transformers or diffusers loads, with their paths."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if kinds & {"PreTrainedModel", "ModelMixin"}:
        yield "", model
        return
    for name, child in model.named_children():
        for path, part in pretrained_parts(child):
            yield f"{name}.{path}".rstrip("."), part


def find_related(models: Iterable[torch.nn.Module], known: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """Return those of the known modules that are in one of these models, or else that hold one of them."""
    known = list(known)
    if not known:
        return []
    inner = [unwrap(model) for model in models]
    parts = {id(module) for model in inner for module in model.modules()}
    roots = {id(model) for model in inner}
    found = [one for one in known if id(one) in parts]
    return found or [one for one in known if any(id(module) in roots for module in one.modules())]
