"""What a patch does to a model: asked of the model, for people and for logs."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from surgery.errors import SettingError, some
from surgery.live.names import unwrap

from .description import Description
from .lifecycle import PATCH, Patch
from .mixout.site import SITE
from .orphans import find_orphans
from .patch import find_patch
from .weights.pretrained import is_distributed, local

_CHUNK = 1 << 22
"""Elements whose distance is taken at once, so that no float64 copy of a large weight is made."""


def describe(model: nn.Module) -> Description:
    """Say what patch_model has done to a model. Of one that is not patched, nothing, but where in it one is."""
    patch = find_patch(model)
    if patch is None:
        return Description(elsewhere=_elsewhere(unwrap(model)))
    gone, added = _changed(unwrap(model), patch)
    active = [site for site in patch.sites if site.weight.requires_grad and site.name not in gone]
    frozen = {name: _FROZEN for site in patch.sites if not site.weight.requires_grad for name in site.target.names}
    devices = {str(site.values.device) for site in active if site.values is not None}
    return Description(
        mixout=patch.mixout,
        rdrop=patch.drop.settings if patch.drop is not None else None,
        anchor=patch.anchor,
        mixed=tuple(site.name for site in active),
        tied=tuple(name for site in active for name in site.target.names[1:]),
        elements=sum(site.weight.numel() for site in active),
        of_elements=sum(parameter.numel() for parameter in model.parameters()),
        left=patch.left | frozen | gone | added,
        uncalled=_uncalled(patch, gone),
        replaced=tuple(rate.name for rate in patch.replaced if getattr(rate.module, rate.attribute, None) == 0),
        kept=tuple(rate.name for rate in patch.kept),
        w_pre=patch.label,
        w_pre_bytes=w_pre_bytes(patch),
        w_pre_device=", ".join(sorted(devices)),
        is_w_pre_lost=any(site.pretrained is not None and site.values is None for site in active),
        anchored=patch.decay.steps if patch.decay is not None else 0,
        fired=patch.drop.measured.fired if patch.drop is not None else 0,
        missed=patch.drop.missed if patch.drop is not None else 0,
        unjoined=tuple(sorted(patch.drop.unjoined)) if patch.drop is not None else (),
        unmixed=patch.lookout.missed if patch.lookout is not None else 0,
    )


_FROZEN = "frozen: mixed once it is trainable"
_GONE = "its layer has been replaced since patch_model: call it again"
_ADDED = "added since patch_model: call it again"


def _elsewhere(root: nn.Module) -> str:
    """Say what patches act in a model that has none of its own."""
    parts = [name for name, module in root.named_modules() if PATCH in module.__dict__]
    if parts:
        return f"its part {some(parts)} is" if len(parts) == 1 else f"its parts {some(parts)} are"
    if find_orphans(root):
        return "copied, loaded or kept from a model that is: call unpatch_model or patch_model on it"
    return "a part of a model that is" if any(SITE in module.__dict__ for module in root.modules()) else ""


def _uncalled(patch: Patch, gone: Collection[str]) -> tuple[str, ...]:
    if not patch.is_mixing or not (patch.steps or patch.has_mixed):
        return ()
    return tuple(name for name in patch.uncalled() if name not in gone)


def _changed(root: nn.Module, patch: Patch) -> tuple[dict[str, str], dict[str, str]]:
    """Name the weights whose layers have left the model since it was patched, and the parameters that have come."""
    modules = set(root.modules())
    gone = {site.name: _GONE for site in patch.sites if not modules.intersection(site.target.owners)}
    known = {id(site.weight) for site in patch.sites if site.name not in gone}
    if not patch.sites:
        return {}, {}
    added = {
        name: _ADDED
        for name, parameter in root.named_parameters()
        if id(parameter) not in known and name not in patch.left and name not in gone
    }
    return gone, added


def stats(model: nn.Module) -> dict[str, Any]:
    """Measure a patched model. Under FSDP every rank must call it.

    Returns:
        steps: forward passes in training mode since it was patched; mixed: number of weights that mixout or anchor acts
        on; w_pre_bytes: on this rank; distance: ||w - w_pre||_2 over all of these weights, in float64.
        With rdrop also: kl, ce: the symmetric KL, without alpha, and the mean cross-entropy of the last forward on this
        rank, as the loss has them (mean over the losses, if it has several); kl_mean, ce_mean: over all forwards since
        they were last read; None where there were none. rdrop_fired: forwards that the KL was a part of.
    Raises:
        SettingError: the model is not patched.
    """
    patch = find_patch(model)
    if patch is None:
        raise SettingError(
            f"{type(model).__name__}: expected a patched model, got one that is {describe(model)}. Call patch_model."
        )
    figures = {
        "steps": patch.steps,
        "mixed": len(describe(model).mixed),
        "w_pre_bytes": w_pre_bytes(patch),
        "distance": distance(patch),
    }
    return figures | (patch.drop.measured.read() if patch.drop is not None else {})


def w_pre_bytes(patch: Patch) -> int:
    """Return what the patch's frozen copies take on this rank, in bytes."""
    return sum(site.pretrained.nbytes for site in patch.sites if site.pretrained is not None)


@torch.no_grad()
def distance(patch: Patch, *, is_whole: bool = True) -> float:
    """Return ||w - w_pre||_2 over all weights that the regularizers act on.

    Args:
        is_whole: False takes of sharded weights the shards of this rank, and asks no other one.
    """
    squares = 0.0
    for site in patch.sites:
        w = site.weight.detach()
        if site.pretrained is None or site.values is None or not site.weight.requires_grad:
            continue
        if is_distributed(w) and is_whole:
            squares += _square_of_shards(w, site.pretrained.part(w))
        else:
            pieces = zip(*(torch.split(t.flatten(), _CHUNK) for t in (local(w), site.pretrained.part(w))), strict=True)
            squares += sum(float((a.double() - b.double()).square().sum()) for a, b in pieces)
    return float(squares**0.5)


def _square_of_shards(w: Any, part: torch.Tensor) -> float:
    """Sum over the ranks that hold a part of `w`; where it is replicated, every rank has all of it."""
    from torch.distributed.tensor import DTensor

    difference = w.to_local().double() - part.double()
    whole = DTensor.from_local(
        difference, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride()
    )
    total: Any = whole.square().sum()
    return float(total.full_tensor())
