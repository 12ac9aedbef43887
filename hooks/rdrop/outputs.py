"""Apply a function to every tensor in what a model returns: a tree_map that enters dataclasses and KV caches too.

A forward writes to a KV cache of transformers and returns it, so that each of two passes needs a copy of its own.
"""

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


def map_output(change: Callable[..., Any], output: Any, *others: Any) -> Any:
    """Copy an output with `change` applied to its tensors, each with those in the same places of `others`.

    Tensors are looked for in all that torch's pytree knows, and in mappings, dataclasses and objects whose attributes
    are tensors. What `change` returns for any other leaf, such as a KV cache, takes its place as well.
    """
    return tree_map(partial(_map_leaf, change), output, *others)


def _map_leaf(change: Callable[..., Any], leaf: Any, *others: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return change(leaf, *others)
    if isinstance(leaf, MutableMapping):
        made = copy.copy(leaf)
        made.update({key: map_output(change, value, *(o[key] for o in others)) for key, value in leaf.items()})
        return made
    attributes = _record_attributes(leaf)
    if not attributes:
        return change(leaf, *others)
    made = copy.copy(leaf)
    for name, value in attributes.items():
        object.__setattr__(made, name, map_output(change, value, *(getattr(o, name) for o in others)))
    return made


def _record_attributes(leaf: Any) -> dict[str, Any]:
    """Return the attributes of a dataclass, or of an object that holds tensors with a gradient; else none."""
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return {field.name: getattr(leaf, field.name) for field in fields(leaf) if hasattr(leaf, field.name)}
    attributes = getattr(leaf, "__dict__", {})
    is_record = any(isinstance(value, torch.Tensor) and value.requires_grad for value in attributes.values())
    return dict(attributes) if is_record and not isinstance(leaf, nn.Module | type) else {}


def is_kv_cache(leaf: Any) -> bool:
    """Tell whether an object is a cache of transformers, or one layer of a cache."""
    return not isinstance(leaf, type) and (hasattr(leaf, "get_seq_length") or hasattr(leaf, "lazy_initialization"))


def map_kv_cache(cache: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Copy a cache, with `change` applied to every tensor in it."""

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        return map_kv_cache(leaf, change) if is_kv_cache(leaf) else leaf

    made = copy.copy(cache)
    vars(made).update({name: tree_map(apply, value) for name, value in vars(cache).items()})
    return made


def copy_containers(arguments: Any) -> Any:
    """Copy containers and caches, which a forward may write to; other tensors are the same."""
    return tree_map(_copy_leaf, arguments)


def _copy_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Mapping):
        return copy.copy(leaf)
    return map_kv_cache(leaf, torch.clone) if is_kv_cache(leaf) else leaf
