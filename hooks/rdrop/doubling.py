"""One forward in place of two: the batch twice over, where that is known to be the same."""

import inspect
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from surgery.errors import SettingError

from .outputs import is_kv_cache, map_kv_cache, map_output

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
_APART = frozenset(["ibert", "prophetnet", "reformer", "tapas", "visual_bert", "xlnet"])
"""Models of transformers that are not as the others: in their rows' order, in a loss for each row or by log_softmax,
or in what they draw or measure once for a whole batch."""
_SOFT = frozenset(["deberta", "deberta_v2"])
"""Models whose loss of labels in two dimensions is made by log_softmax."""
_ROUTED = re.compile("Router|Expert|M[Oo]E|Moe|Gating")
_PLAIN = (bool, int, float, str, type(None))


def is_known(root: nn.Module, arguments: Arguments) -> bool:
    """Tell whether a doubled batch surely does what two passes do.

    So it is for a head of transformers, as it comes, that is given labels and tensors of one batch, and no layer of
    which looks at the batch as a whole. A batch of one may be a row of packed sequences, and models look for those in
    batches of one only.
    """
    if not _is_head(root):
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
        and not (_has_soft_loss(root) and tensors["labels"].dim() > 1)
        and ("position_ids" not in tensors or _shape(tensors, "position_ids") == _shape(tensors, "input_ids"))
        and not any(map(_is_of_batch, root.modules()))
    )


def _is_head(root: nn.Module) -> bool:
    """Tell whether a model is one of those, with its own forward and its own loss."""
    what = type(root)
    forward = inspect.unwrap(root.forward)  # accelerate wraps it
    return (
        what.__module__.startswith("transformers.models.")
        and what.__name__.endswith(_HEADS)
        and _family(root) not in _APART
        and forward.__module__.startswith("transformers.")
        and "_loss_function" not in vars(root)
    )


def _has_soft_loss(root: nn.Module) -> bool:
    return _family(root) in _SOFT and type(root).__name__.endswith("ForSequenceClassification")


def _family(root: nn.Module) -> str:
    return type(root).__module__.split(".")[2]


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> Any:
    return tensors[name].shape if name in tensors else None


def _is_of_batch(module: nn.Module) -> bool:
    """Tell whether a layer may depend on the batch as a whole, or draw for it."""
    kind: Any = type(module)
    return _is_kind_of_batch(kind) or bool(vars(module).get("layerdrop"))


@cache
def _is_kind_of_batch(what: type[nn.Module]) -> bool:
    """Tell BatchNorm, experts that are balanced or full, and what is unknown, such as PEFT's rank_dropout."""
    is_known = what.__module__.startswith(("torch.nn.modules.", "transformers."))
    return not is_known or issubclass(what, _BatchNorm) or _ROUTED.search(what.__name__) is not None


def batch_rows(root: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """Return the first dimension that all tensors share, and that of the rows of a multiple choice.

    Raises:
        SettingError: they do not, or something else may depend on the batch.
    """
    named = _named(root, arguments)
    tensors = {
        name: leaf
        for name, value in named.items()
        for leaf in tree_leaves(value)
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
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
    choices = [shape for name, shape in shapes.items() if len(shape) == 3 and not tensors[name].is_floating_point()]
    return next(iter(shapes.values()))[0], *(shape[0] * shape[1] for shape in choices)


def double(arguments: Arguments) -> Arguments:
    """Put every tensor but scalars after itself, along the first dimension."""
    doubled: Arguments = tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 else leaf, arguments
    )
    return doubled


def halve(output: Any, rows: tuple[int, ...]) -> tuple[Any, Any]:
    """Split what a doubled batch has come to, in two structures like the first.

    Args:
        rows: what batch_rows has returned.
    """
    return _take(output, half=0, rows=rows), _take(output, half=1, rows=rows)


def _take(output: Any, *, half: int, rows: tuple[int, ...]) -> Any:
    return map_output(partial(_take_leaf, half=half, rows=rows), output)


def _take_leaf(leaf: Any, *, half: int, rows: tuple[int, ...]) -> Any:
    if is_kv_cache(leaf):
        return map_kv_cache(leaf, partial(_take, half=half, rows=rows))
    if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] in [2 * size for size in rows]:
        return leaf.chunk(2)[half]
    return leaf


def _named(root: nn.Module, arguments: Arguments) -> Mapping[str, Any]:
    """Put names to a forward's arguments."""
    args, kwargs = arguments
    bound = inspect.signature(root.forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named
