"""Decay toward w_pre before every optimizer step, whatever the optimizer."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .pretrained import local

if TYPE_CHECKING:
    from .state import Patch

_watched: "weakref.WeakSet[Patch]" = weakref.WeakSet()
_handles: list[Any] = []


def watch(patch: "Patch") -> None:
    """Decay the patch's weights from now on, in any optimizer that holds them."""
    _watched.add(patch)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def forget(patch: "Patch") -> None:
    """Decay the patch's weights no longer; with the last patch, the optimizers' hooks go."""
    _watched.discard(patch)
    if not _watched:
        while _handles:
            _handles.pop().remove()


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    for patch in list(_watched):
        # an optimizer that wraps another has both of them step; the one that is open may have raised, and step again
        if patch.open_step in (None, id(optimizer)) and _decay(patch, optimizer):
            patch.open_step = id(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    for patch in list(_watched):
        if patch.open_step == id(optimizer):
            patch.open_step = None


def _decay(patch: "Patch", optimizer: Optimizer) -> bool:
    """Take w toward w_pre by lr * weight of the distance, where the step has a gradient for w, as AdamW does.

    Returns:
        Whether the optimizer holds such a weight.
    """
    assert patch.anchor is not None
    if getattr(optimizer, "found_inf", None):  # a fused optimizer skips the step by itself, where GradScaler found inf
        return False
    sites = {id(site.weight): site for site in patch.sites}
    is_ours = False
    for group in optimizer.param_groups:
        for w in group["params"]:
            if w.grad is not None and (site := sites.get(id(w))) is not None:
                local(w).lerp_(site.ready(w).part(w), float(group["lr"]) * patch.anchor.weight)
                is_ours = True
    patch.anchored += is_ours
    return is_ours
