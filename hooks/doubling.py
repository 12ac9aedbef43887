"""One forward in place of two: the batch twice over, where that is known to be the same."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from surgery.errors import SettingError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the named arguments of a forward."""

_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForImageClassification",
)
_BATCHED = frozenset(
    """input_ids inputs_embeds attention_mask token_type_ids position_ids labels pixel_values start_positions
    end_positions decoder_input_ids decoder_attention_mask decoder_inputs_embeds""".split()
)
"""Arguments of these heads whose first dimension is the batch."""
_LABELS = frozenset(["labels", "start_positions"])
_PLAIN = (bool, int, float, str, type(None))


def is_known(root: nn.Module, arguments: Arguments) -> bool:
    """Tell whether a doubled batch surely does what two passes do.

    So it is for a head of transformers, as it comes, that is given labels and tensors of one batch, and that has no
    BatchNorm. A batch of one may be a row of packed sequences, and models look for those in batches of one only.
    """
    what = type(root)
    if not what.__module__.startswith("transformers.models.") or not what.__name__.endswith(_HEADS):
        return False
    named = _named(root, arguments)
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    plain = [value for name, value in named.items() if name not in tensors]
    sizes = {value.shape[0] for value in tensors.values()}
    return (
        tensors.keys() <= _BATCHED
        and not _LABELS.isdisjoint(tensors)
        and all(isinstance(value, _PLAIN) or (isinstance(value, torch.Tensor) and not value.dim()) for value in plain)
        and len(sizes) == 1
        and min(sizes) > 1
        and not any(isinstance(module, _BatchNorm) for module in root.modules())
    )


def batch_size(root: nn.Module, arguments: Arguments) -> int:
    """Return the first dimension that all tensors share.

    Raises:
        SettingError: they do not, or something else may depend on the batch.
    """
    named = _named(root, arguments)
    shapes = {
        name: tuple(leaf.shape)
        for name, value in named.items()
        for leaf in tree_leaves(value)
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0
    }
    others = {
        name: type(leaf).__name__
        for name, value in named.items()
        for leaf in tree_leaves(value)
        if not isinstance(leaf, (*_PLAIN, torch.Tensor))
    }
    if others or len({shape[0] for shape in shapes.values()}) != 1:
        got = ", ".join(f"{name} {what}" for name, what in (shapes | others).items())
        raise SettingError(
            f'passes: expected tensors of one first dimension to double, got {got or "none"}. Use passes="two".'
        )
    return next(iter(shapes.values()))[0]


def double(arguments: Arguments) -> Arguments:
    """Put every tensor but scalars after itself, along the first dimension."""
    doubled: Arguments = tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 else leaf, arguments
    )
    return doubled


def halve(output: Any, size: int) -> tuple[Any, Any]:
    """Split what a doubled batch has come to, in two structures like the first.

    Args:
        size: of the batch, before it was doubled.
    """
    leaves, spec = tree_flatten(output)
    halves = [_split(leaf, size) for leaf in leaves]
    return spec.unflatten(half[0] for half in halves), spec.unflatten(half[1] for half in halves)


def _split(leaf: Any, size: int) -> tuple[Any, Any]:
    if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == 2 * size:
        return leaf[:size], leaf[size:]
    return leaf, leaf


def _named(root: nn.Module, arguments: Arguments) -> Mapping[str, Any]:
    """Put names to a forward's arguments."""
    args, kwargs = arguments
    bound = inspect.signature(root.forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named
