"""Which layers Mixout can mix, and the axis of their input features; a new kind of layer is added here."""

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from surgery.live.foreign import packed_class
from surgery.live.zero3 import shape_of

Shape = tuple[int, ...]
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


def mask_shape(module: nn.Module) -> tuple[Shape, int] | None:
    """Return the shape of a mask per input feature, and how often each of its rows is repeated; None if not mixable.

    The mask, its rows repeated, broadcasts over `module.weight`. A feature of a Conv is an input channel, of an
    Embedding a token: the row whose weights leave the same input together.

    Args:
        module: nn.Linear (out, in), transformers' Conv1D (in, out), nn.Conv1d to nn.Conv3d (out, in / groups, ...), or
            nn.Embedding (in, out).
    """
    weight = module._parameters.get("weight")
    shape = tuple(shape_of(weight)) if weight is not None and _is_known(module) else ()
    if not shape:
        return None
    if isinstance(module, nn.Linear):
        return (1, shape[1]), 1
    if isinstance(module, CONVOLUTIONS):
        taps = (1,) * (len(shape) - 2)
        return (module.groups, shape[1], *taps), shape[0] // module.groups if module.groups > 1 else 1
    return (shape[0], 1), 1


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return False
    return isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether this is transformers' Conv1D, GPT-2's linear layer, without importing transformers."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def is_read_by_attention(module: nn.Module) -> bool:
    """Tell whether nn.MultiheadAttention reads this layer's weight without calling the layer, so that no hook fires."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_part_of_weight(module: nn.Module, attribute: str) -> bool:
    """Tell whether parametrize or weight_norm computes a layer's weight from this parameter."""
    if attribute in ("weight_g", "weight_v"):
        return has_old_weight_norm(module)
    return isinstance(module, ParametrizationList)


def has_old_weight_norm(module: nn.Module) -> bool:
    """Tell whether nn.utils.weight_norm, without parametrize, has split the weight."""
    return {"weight_g", "weight_v"} <= module._parameters.keys()


def packing(weight: torch.Tensor) -> str | None:
    """Return what a weight is quantized to, by its dtype or its class; None if it is simply elements."""
    packed = packed_class(weight)
    if packed is not None and packed.__name__ != "DTensor":
        return packed.__name__
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.is_quantized:
        return str(weight.dtype).removeprefix("torch.")
    return None
