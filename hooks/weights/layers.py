"""Which weights Mixout can mix, and the axes of their input features; a new kind of layer is added here."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from surgery.live.foreign import packed_class
from surgery.live.zero3 import shape_of

Shape = tuple[int, ...]
Axes = tuple[int, ...]
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_GATED = "gate_up_proj", "down_proj"
_OUT_IN, _IN_OUT = (0, 2), (0, 1)
"""Axes of the features that each expert reads, in weights of shape (experts, out, in) and (experts, in, out)."""

_OF_TRANSFORMERS: Mapping[str, Mapping[str, Axes]] = {
    "XLNetRelativeAttention": {"q": (0,), "k": (0,), "v": (0,), "r": (0,), "o": (1, 2)},
    "LongcatFlashExperts": dict.fromkeys(_GATED, _OUT_IN),
    "InklingSharedExperts": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), _OUT_IN),
    "Llama4TextExperts": dict.fromkeys(_GATED, _IN_OUT),
    "GptOssExperts": dict.fromkeys(_GATED, _IN_OUT),
    "JetMoeParallelExperts": {"weight": _OUT_IN},
    "GraniteMoeParallelExperts": {"weight": _OUT_IN},
    "GraniteMoeSharedParallelExperts": {"weight": _OUT_IN},
    "GraniteMoeHybridParallelExperts": {"weight": _OUT_IN},
}
"""Classes that say by their code alone which axes these are; GPT-OSS' and Granite's are so in transformers 4."""


def feature_axes(module: nn.Module) -> Mapping[str, Axes]:
    """Return the attributes of a module that are weights to mix, each with the axes that number its input features.

    Args:
        module: nn.Linear (out, in), transformers' Conv1D (in, out), nn.Conv1d to nn.Conv3d (out, in / groups, ...),
            nn.ConvTranspose1d to 3d (in, out / groups, ...), nn.Embedding (in, out), nn.MultiheadAttention's
            projections (out, in), nn.RNN, nn.LSTM, nn.GRU and their cells (gates, in), XLNet's projections
            (in, heads, size) and (out, heads, size), and experts in one tensor.
    """
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return {}
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return {"weight": (1,)}
    if isinstance(module, (nn.Embedding, *TRANSPOSED)) or is_conv1d(module):
        return {"weight": (0,)}
    if isinstance(module, nn.MultiheadAttention):
        separate = "q_proj_weight", "k_proj_weight", "v_proj_weight"
        return dict.fromkeys(("in_proj_weight",) if module._qkv_same_embed_dim else separate, (1,))
    if isinstance(module, nn.RNNBase):
        return {name: (1,) for name in module._flat_weights_names if name.startswith("weight_")}
    if isinstance(module, nn.RNNCellBase):
        return {"weight_ih": (1,), "weight_hh": (1,)}
    return _axes_in_transformers(module)


def _axes_in_transformers(module: nn.Module) -> Mapping[str, Axes]:
    """Return those of a class of transformers, or of one that its use_experts_implementation has decorated."""
    if {"is_transposed", "has_gate"} <= vars(module).keys():
        names = _GATED if module.has_gate else ("up_proj", "down_proj")
        return dict.fromkeys(names, _IN_OUT if module.is_transposed else _OUT_IN)
    return next((axes for name, axes in _OF_TRANSFORMERS.items() if _is_of_transformers(module, name)), {})


def mask_shape(module: nn.Module, attribute: str = "weight") -> tuple[Shape, int] | None:
    """Return the shape of a mask per input feature, and how often each of its rows is repeated; None if not mixable.

    The mask, its rows repeated, broadcasts over the weight. A feature of a Conv is an input channel, of an Embedding a
    token: the row whose weights leave the same input together. Each expert has features of its own.
    """
    weight, axes = module._parameters.get(attribute), feature_axes(module).get(attribute)
    sizes: tuple[int, ...] = shape_of(weight) if weight is not None else ()
    if axes is None or len(sizes) <= max(axes):
        return None
    shape = tuple(size if axis in axes else 1 for axis, size in enumerate(sizes))
    groups = module.groups if isinstance(module, CONVOLUTIONS) else 1
    return ((groups, *shape[1:]), sizes[0] // groups) if groups > 1 else (shape, 1)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether this is transformers' Conv1D, GPT-2's linear layer, without importing transformers."""
    return _is_of_transformers(module, "Conv1D")


def _is_of_transformers(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("transformers.") for kind in type(module).__mro__)


def is_read_by_attention(module: nn.Module) -> bool:
    """Tell whether nn.MultiheadAttention reads this layer's weight without calling the layer, so that no hook fires."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def find_readers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the layers whose weights another module reads without calling them, each with that module."""
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return {module.out_proj: module for module in attentions if hasattr(module, "out_proj")}


def is_part_of_weight(module: nn.Module, attribute: str) -> bool:
    """Tell whether parametrize or weight_norm computes a layer's weight from this parameter."""
    if attribute.endswith(("_g", "_v")):
        return has_old_weight_norm(module, attribute[:-2])
    return isinstance(module, ParametrizationList)


def has_old_weight_norm(module: nn.Module, attribute: str) -> bool:
    """Tell whether nn.utils.weight_norm, without parametrize, has split the weight."""
    return {f"{attribute}_g", f"{attribute}_v"} <= module._parameters.keys()


def packing(weight: torch.Tensor) -> str | None:
    """Return what a weight is quantized to, by its dtype or its class; None if it is simply elements."""
    packed = packed_class(weight)
    if packed is not None and packed.__name__ != "DTensor":
        return packed.__name__
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.is_quantized:
        return str(weight.dtype).removeprefix("torch.")
    return None
