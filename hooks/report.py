"""What a patch does to a model, for people and for logs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.errors import SettingError, some
from surgery.names import unwrap

from .mixout import SITE
from .orphans import find_orphans
from .patch import find_patch
from .pretrained import is_distributed
from .settings import Anchor, Mixout
from .state import PATCH, Patch

_CHUNK = 1 << 22
"""Elements whose distance is taken at once, so that no float64 copy of a large weight is made."""


@dataclass(frozen=True)
class Description:
    """What is patched, what is not, and why. str() lays it out for people.

    Args:
        mixout, anchor: the settings; both None if the model is not patched.
        mixed: names of the weights that the regularizers act on.
        tied: further names of these weights.
        elements: how many elements those weights have; of_elements: how many the model's parameters have.
        left: why each other parameter is left alone, by name.
        uncalled: mixed weights whose layers no forward in training mode has called yet, once there was one.
        replaced, kept: names of the dropout rates set to 0, and of those that stay.
        w_pre: where the pretrained weights come from.
        w_pre_bytes: what they take on this rank, in bytes.
        w_pre_device: where they lie.
        is_w_pre_lost: they have stayed behind a pickle.
        anchored: optimizer steps that the anchor acted in.
        unmixed: optimizer steps, if there was no forward in training mode until now.
        elsewhere: of a model that is not patched itself: what of it, or around it, is.
    """

    mixout: Mixout | None = None
    anchor: Anchor | None = None
    mixed: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    elements: int = 0
    of_elements: int = 0
    left: dict[str, str] | None = None
    uncalled: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    w_pre: str = ""
    w_pre_bytes: int = 0
    w_pre_device: str = ""
    is_w_pre_lost: bool = False
    anchored: int = 0
    unmixed: int = 0
    elsewhere: str = ""

    def __str__(self) -> str:
        return "\n".join(_lines(self))


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
        unmixed=patch.lookout.steps if patch.lookout is not None and not patch.has_mixed else 0,
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
    added = {
        name: _ADDED
        for name, parameter in root.named_parameters()
        if id(parameter) not in known and name not in patch.left and name not in gone
    }
    return gone, added


def stats(model: nn.Module) -> dict[str, Any]:
    """Measure a patched model. Under FSDP every rank must call it.

    Returns:
        steps: forward passes in training mode since it was patched; mixed: number of weights that the regularizers act
        on; w_pre_bytes: on this rank; distance: ||w - w_pre||_2 over all of these weights, in float64.
    Raises:
        SettingError: the model is not patched.
    """
    patch = find_patch(model)
    if patch is None:
        raise SettingError(
            f"{type(model).__name__}: expected a patched model, got one that is {describe(model)}. Call patch_model."
        )
    return {
        "steps": patch.steps,
        "mixed": len(describe(model).mixed),
        "w_pre_bytes": w_pre_bytes(patch),
        "distance": distance(patch),
    }


def w_pre_bytes(patch: Patch) -> int:
    """Return what the patch's frozen copies take on this rank, in bytes."""
    return sum(site.pretrained.nbytes for site in patch.sites if site.pretrained is not None)


@torch.no_grad()
def distance(patch: Patch) -> float:
    """Return ||w - w_pre||_2 over all weights that the regularizers act on."""
    squares = 0.0
    for site in patch.sites:
        w = site.weight.detach()
        if site.pretrained is None or site.values is None or not site.weight.requires_grad:
            continue
        if is_distributed(w):
            squares += _square_of_shards(w, site.pretrained.part(w))
        else:
            pieces = zip(
                torch.split(w.flatten(), _CHUNK), torch.split(site.pretrained(w).flatten(), _CHUNK), strict=True
            )
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


def _lines(found: Description) -> list[str]:
    if found.mixout is None and found.anchor is None:
        return [f"not patched{found.elsewhere and ' itself, but '}{found.elsewhere}"]
    lines = []
    if found.mixout is not None:
        m = found.mixout
        lines.append(f"mixout       p = {m.p:g}, one mask value per {_UNIT[m.granularity]}, {m.gradient} gradient")
    if found.unmixed:
        lines.append(f"NOT MIXED    so far: no forward in training mode in {found.unmixed} optimizer steps")
    if found.anchor is not None:
        lines.append(
            f"anchor       weight {found.anchor.weight:g}, in {found.anchored} optimizer steps so far; set the "
            "optimizer's weight_decay for these weights to 0"
        )
    verb = "mixed" if found.mixout is not None else "anchored"
    share = f"{found.elements:,} of {found.of_elements:,} elements"
    lines.append(f"{verb:12} {len(found.mixed)} weights, {share}: {_first(found.mixed) or _NOTHING}")
    if found.tied:
        lines.append(f"{'':12} {len(found.tied)} more names for them (tied): {_first(found.tied)}")
    where = f"{found.w_pre_bytes / 1e6:,.1f} MB on {found.w_pre_device or 'no device'}"
    lines.append(f"w_pre        {found.w_pre}; {_LOST if found.is_w_pre_lost else where}")
    for reason, names in _by_reason(found.left or {}).items():
        lines.append(f"not {verb:8} {len(names)} ({reason}): {_first(names)}")
    if found.uncalled:
        lines.append(
            f"NOT CALLED   {len(found.uncalled)} (no forward in training reached them): {_first(found.uncalled)}"
        )
    for what, rates in (("set to 0", found.replaced), ("kept", found.kept)):
        if rates:
            lines.append(f"dropout      {len(rates)} {what}: {_first(rates)}")
    return lines


_LOST = "MISSING: a pickle does not carry it. Call patch_model with w_pre and all settings again"
_NOTHING = "NOTHING IS REGULARIZED, for all of them are frozen"
_UNIT = {"neuron": "input feature", "element": "element"}


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:1], *["..."] * (len(names) > 1)])


def _by_reason(left: dict[str, str]) -> dict[str, list[str]]:
    turned: dict[str, list[str]] = {}
    for name, reason in left.items():
        turned.setdefault(reason, []).append(name)
    return turned
