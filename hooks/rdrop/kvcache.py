"""transformers' caches of keys and values, which a forward writes to and returns, and which are no tensors."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map


def is_cache(leaf: Any) -> bool:
    """Tell a cache, or a layer of one."""
    return not isinstance(leaf, type) and (hasattr(leaf, "get_seq_length") or hasattr(leaf, "lazy_initialization"))


def map_cache(cache: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Copy a cache, with every tensor in it changed."""

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        return map_cache(leaf, change) if is_cache(leaf) else leaf

    made = copy.copy(cache)
    vars(made).update({name: tree_map(apply, value) for name, value in vars(cache).items()})
    return made
