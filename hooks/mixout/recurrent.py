"""What nn.RNNBase hands to its kernels: a list of tensors beside its attributes, made anew where these differ from it.

To make it anew is to flatten all of an RNN's weights in a GPU's memory, W_mix and biases among them, at every forward.
"""

import weakref
from collections.abc import MutableMapping
from typing import Any

import torch

_NAMES, _TENSORS, _REFERENCES = "_flat_weights_names", "_flat_weights", "_flat_weight_refs"


def put_flat(attributes: MutableMapping[str, Any], attribute: str, tensor: torch.Tensor | None) -> None:
    """Have an RNN's kernel compute with a tensor in the place of that attribute's.

    Args:
        attributes: those of a module of any kind, or a copy of them.
    """
    if attribute not in attributes.get(_NAMES, ()):
        return
    index = attributes[_NAMES].index(attribute)
    attributes[_TENSORS] = _replaced(attributes[_TENSORS], index, tensor)
    if attributes.get(_REFERENCES):
        reference = None if tensor is None else weakref.ref(tensor)
        attributes[_REFERENCES] = _replaced(attributes[_REFERENCES], index, reference)


def _replaced(values: list[Any], index: int, value: Any) -> list[Any]:
    """Return another list: a copy of the attributes shares this one with the module."""
    return [*values[:index], value, *values[index + 1 :]]
