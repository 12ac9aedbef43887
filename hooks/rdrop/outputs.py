"""What a model returns: tensors, in whatever holds them."""

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


def map_output(change: Callable[..., Any], output: Any, *others: Any) -> Any:
    """Copy an output with `change` applied to its tensors, each with those in the same places of `others`.

    Tensors are looked for in all that torch's pytree knows, and in mappings, dataclasses and plain records. What
    `change` returns for anything else takes its place as well.
    """
    return tree_map(partial(_map_leaf, change), output, *others)


def _map_leaf(change: Callable[..., Any], leaf: Any, *others: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return change(leaf, *others)
    if isinstance(leaf, MutableMapping):
        made = copy.copy(leaf)
        made.update({key: map_output(change, value, *(o[key] for o in others)) for key, value in leaf.items()})
        return made
    attributes = _attributes(leaf)
    if not attributes:
        return change(leaf, *others)
    made = copy.copy(leaf)
    for name, value in attributes.items():
        object.__setattr__(made, name, map_output(change, value, *(getattr(o, name) for o in others)))
    return made


def _attributes(thing: Any) -> dict[str, Any]:
    """Return the attributes of a record, none of anything else."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: getattr(thing, field.name) for field in fields(thing) if hasattr(thing, field.name)}
    attributes = getattr(thing, "__dict__", {})
    is_record = any(isinstance(value, torch.Tensor) and value.requires_grad for value in attributes.values())
    return dict(attributes) if is_record and not isinstance(thing, nn.Module | type) else {}
