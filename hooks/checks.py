"""What hooks on a live model cannot work with: refused before anything is changed."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.nn.parameter import is_lazy

from surgery.errors import SettingError, SourceError
from surgery.live.foreign import is_fsdp1
from surgery.live.parts import unwrap

from .active_calls import count_active_calls
from .marks import PATCH, Part


def root_of(model: Any) -> nn.Module:
    """Return the model within torch.compile's or DistributedDataParallel's wrapper."""
    if not isinstance(model, nn.Module):
        raise SettingError(f"model: expected an nn.Module, got {type(model).__name__}. Pass the model itself.")
    unwrapped: nn.Module = unwrap(model)
    return unwrapped


def take_root(model: Any, *, may_be_compiled: bool = False) -> nn.Module:
    """Return the model within DistributedDataParallel; refuse what hooks cannot work with.

    Args:
        may_be_compiled: the caller has torch.compile forget the graphs it has made.
    """
    root = root_of(model)
    what = type(root).__name__
    if isinstance(model, DataParallel):
        raise SourceError(
            f"{what}: expected a model in one place, got DataParallel, whose replicas are not its layers. "
            "Use DistributedDataParallel."
        )
    for name, module in model.named_modules():
        path = name or type(module).__name__
        if is_compiled(module) and not may_be_compiled:
            raise SourceError(
                f"{path}: expected a model that is not compiled, got one that is: its hooks would never run. "
                "Call patch_model before torch.compile."
            )
        if any(map(is_lazy, module._parameters.values())):
            raise SourceError(
                f"{path}: expected layers that know their shapes, got one that waits for its first input. "
                "Run a forward before patch_model."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise SourceError(f"{path}: expected Python modules, got TorchScript. Patch the model before scripting it.")
        if is_fsdp1(module):
            raise SourceError(
                f"{path}: expected whole weights or FSDP 2, got FSDP 1, which flattens them. Use fully_shard, or "
                "`accelerate launch --fsdp_version 2`."
            )
    return root


def is_compiled(module: nn.Module) -> bool:
    """Tell whether torch.compile was given a module, by either of its two ways."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def refuse_amid_forward(root: nn.Module) -> None:
    """Refuse to change a patched model that one of its own hooks or layers asks for it: the forward is half done."""
    if PATCH in root.__dict__ and count_active_calls(root):
        raise SourceError(
            f"{type(root).__name__}: expected a model between its forwards, got one amid a forward. Call patch_model "
            "or unpatch_model after it."
        )


def refuse_others(root: nn.Module, own: object) -> None:
    """Refuse modules that belong to the patch of another model: one of the two would undo the other.

    Args:
        own: the model's own patch, if it has one.
    """
    for name, module in root.named_modules():
        part = module.__dict__.get(Part.attribute)
        is_other = part is not None and not part.is_orphan and not part.is_of(own)
        if (module is not root and PATCH in module.__dict__) or is_other:
            raise SourceError(
                f"{name or type(root).__name__}: expected modules of one patched model, got one that patch_model has "
                "patched as a part of another. Call unpatch_model on that one first."
            )
