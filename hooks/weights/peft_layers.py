"""PEFT's wrappers of layers, told without importing peft: which weights are adapters, and which are trained copies."""

from collections.abc import Iterator
from typing import Any

from torch import nn

_COPIES = {"modules_to_save": "original_module", "ln_tuning_layers": "base_layer"}
"""Attributes that hold a copy of a whole layer for each adapter, and where the layer that was copied is."""

_SWAPPING = "MultiheadAttention", "ParamWrapper"


def is_wrapper(module: nn.Module) -> bool:
    """Tell whether PEFT has put this in a layer's place, known by the attribute that lists what it trains."""
    return hasattr(module, "adapter_layer_names")


def adapter_names(model: nn.Module) -> set[str]:
    """Return the names of the adapters' parameters, without those of copies of layers."""
    return {
        f"{path}.{attribute}.{name}".lstrip(".")
        for path, attribute, held in _trained(model)
        if attribute not in _COPIES
        for name, _ in held.named_parameters()
    }


def find_copies(model: nn.Module) -> dict[str, str]:
    """Return the names of parameters in trained copies of layers, each with that of the parameter it is a copy of.

    PEFT copies a layer before it is trained, by modules_to_save or LN-tuning, and keeps the original beside it: what is
    pretrained in the original is in the copy too, which deepcopy has made without the original's marks.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, str] = {}
    for path, attribute, held in _trained(model):
        for name, _ in held.named_parameters() if attribute in _COPIES else ():
            original = f"{path}.{_COPIES[attribute]}.{name.partition('.')[2]}".lstrip(".")
            if original in names:
                found[f"{path}.{attribute}.{name}".lstrip(".")] = original
    return found


def find_swapped(model: nn.Module) -> set[nn.Module]:
    """Return the layers that PEFT gives another weight at each call: for LoRA of attention, or of a bare parameter."""
    wrappers = [one for one in model.modules() if type(one).__name__ in _SWAPPING and is_wrapper(one)]
    return {module for wrapper in wrappers for module in wrapper.base_layer.modules()}  # type: ignore[union-attr]


def _trained(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yield the path of each wrapper with an attribute that it trains, and the module that this is."""
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in getattr(module, "adapter_layer_names", ()):
            held = getattr(module, attribute, None)
            if isinstance(held, nn.Module):
                yield path, attribute, held
