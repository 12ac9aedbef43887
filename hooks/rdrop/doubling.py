"""One forward of torch.cat([batch, batch]) in place of two, and for which models and inputs the loss is the same."""

import inspect
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._pytree import tree_leaves, tree_map

from surgery.errors import SettingError

from ..marks import is_ours
from .outputs import is_kv_cache, map_kv_cache, map_output

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a forward."""

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
_BATCHED_ARGUMENTS = frozenset(
    """input_ids inputs_embeds attention_mask token_type_ids position_ids labels pixel_values start_positions
    end_positions decoder_input_ids decoder_attention_mask decoder_inputs_embeds""".split()
)
"""Arguments of these heads whose first dimension is the batch."""
_LABELS = frozenset(["labels", "start_positions"])
_NEVER_DOUBLED = frozenset(["ibert", "prophetnet", "reformer", "tapas", "visual_bert", "xlnet"])
"""Models of transformers that are not as the others: in their rows' order, in a loss for each row or by log_softmax,
or in what they draw or measure once for a whole batch."""
_SOFT_LABEL_TYPES = frozenset(["deberta", "deberta_v2"])
"""Models whose loss of labels in two dimensions is made by log_softmax."""
_MIXTURE_OF_EXPERTS = re.compile("Router|Expert|M[Oo]E|Moe|Gating")
_SCALARS = (bool, int, float, str, type(None))


def is_equivalent(root: nn.Module, arguments: Arguments) -> bool:
    """Tell whether a doubled batch is known to give what two passes give.

    It does for an unmodified head of transformers that is given labels and tensors of one batch, and no layer of which
    depends on the batch as a whole, or has a hook of the script's. A batch of one may be a row of packed sequences, and
    models look for those in batches of one only.
    """
    if not _is_head(root):
        return False
    named = _bind_arguments(root, arguments)
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    rest = [value for name, value in named.items() if name not in tensors]
    sizes = {value.shape[0] for value in tensors.values()}
    return (
        tensors.keys() <= _BATCHED_ARGUMENTS
        and not _LABELS.isdisjoint(tensors)
        and all(isinstance(value, _SCALARS) or (isinstance(value, torch.Tensor) and not value.dim()) for value in rest)
        and len(sizes) == 1
        and min(sizes) > 1
        and not named.get("fused_lm_head")  # of TRL, which reduces the loss of a doubled batch as if it were one
        and not (_has_soft_loss(root) and tensors["labels"].dim() > 1)
        and ("position_ids" not in tensors or _shape(tensors, "position_ids") == _shape(tensors, "input_ids"))
        and not any(map(_is_foreign, (*_global_forward_hooks.values(), *_global_forward_pre_hooks.values())))
        and not any(map(_is_batch_dependent, root.modules()))
    )


def _is_head(root: nn.Module) -> bool:
    """Tell whether a model is one of _HEADS, with the forward and the loss that transformers gave it."""
    cls = type(root)
    forward = inspect.unwrap(root.forward)  # accelerate wraps it
    return (
        cls.__module__.startswith("transformers.models.")
        and cls.__name__.endswith(_HEADS)
        and _model_type(root) not in _NEVER_DOUBLED
        and forward.__module__.startswith("transformers.")
        and "_loss_function" not in vars(root)
    )


def _has_soft_loss(root: nn.Module) -> bool:
    return _model_type(root) in _SOFT_LABEL_TYPES and type(root).__name__.endswith("ForSequenceClassification")


def _model_type(root: nn.Module) -> str:
    return type(root).__module__.split(".")[2]


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> Any:
    return tensors[name].shape if name in tensors else None


def _is_batch_dependent(module: nn.Module) -> bool:
    """Tell whether a layer may depend on the batch as a whole, draw one random number for it, or show it to a hook."""
    kind: Any = type(module)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return _is_batch_dependent_class(kind) or bool(vars(module).get("layerdrop")) or any(map(_is_foreign, hooks))


def _is_foreign(hook: Any) -> bool:
    """Tell a hook that may be the script's, which expects the batch that the script made."""
    return not is_ours(hook) and not str(getattr(hook, "__module__", "")).startswith(("torch.", "transformers."))


@cache
def _is_batch_dependent_class(cls: type[nn.Module]) -> bool:
    """Tell whether a class is BatchNorm, a router or expert, or not of torch or transformers, as PEFT's layers are."""
    is_known = cls.__module__.startswith(("torch.nn.modules.", "transformers."))
    return not is_known or issubclass(cls, _BatchNorm) or _MIXTURE_OF_EXPERTS.search(cls.__name__) is not None


def batch_sizes(root: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """Return the first dimension that all tensors share, and that of the rows of a multiple choice.

    Raises:
        SettingError: they do not, or something else may depend on the batch.
    """
    named = _bind_arguments(root, arguments)
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
        if not isinstance(leaf, (*_SCALARS, torch.Tensor))
    }
    if others or len({shape[0] for shape in shapes.values()}) != 1:
        got = ", ".join(f"{name} {what}" for name, what in (shapes | others).items())
        raise SettingError(
            f'passes: expected tensors of one first dimension to double, got {got or "none"}. Use passes="two".'
        )
    choices = [shape for name, shape in shapes.items() if len(shape) == 3 and not tensors[name].is_floating_point()]
    return next(iter(shapes.values()))[0], *(shape[0] * shape[1] for shape in choices)


def double_batch(arguments: Arguments) -> Arguments:
    """Concatenate every tensor but 0-dim ones with itself, along the first dimension."""
    doubled: Arguments = tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 else leaf, arguments
    )
    return doubled


def halve_output(output: Any, sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """Split the output of a doubled batch into two outputs of the same structure.

    Args:
        sizes: what batch_sizes has returned.
    """
    return _take_half(output, half=0, sizes=sizes), _take_half(output, half=1, sizes=sizes)


def _take_half(output: Any, *, half: int, sizes: tuple[int, ...]) -> Any:
    return map_output(partial(_take_half_of_leaf, half=half, sizes=sizes), output)


def _take_half_of_leaf(leaf: Any, *, half: int, sizes: tuple[int, ...]) -> Any:
    if is_kv_cache(leaf):
        return map_kv_cache(leaf, partial(_take_half, half=half, sizes=sizes))
    if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] in [2 * size for size in sizes]:
        return leaf.chunk(2)[half]
    return leaf


def _bind_arguments(root: nn.Module, arguments: Arguments) -> Mapping[str, Any]:
    """Bind a forward's arguments to the names of its parameters."""
    args, kwargs = arguments
    bound = inspect.signature(root.forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named
