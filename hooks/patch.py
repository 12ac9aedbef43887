"""patch_model and its siblings: check everything, then change the model, or leave it as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.nn.parameter import is_lazy

from surgery.errors import SettingError, SourceError, some
from surgery.live.names import unwrap
from surgery.noisytune import as_globs

from .lifecycle import PATCH, Patch
from .mixout.site import SITE, Pass, Site
from .orphans import find_orphans, release
from .settings import Anchor, Mixout, RDrop
from .weights.offload import Offload
from .weights.pretrained import is_distributed, refuse_not_finite
from .weights.selection import Target, choose, refuse_unready
from .weights.sources import Kept, Source, open_origin

_Model = TypeVar("_Model", bound=nn.Module)
_DEFAULT = Mixout(0.7)


def patch_model(
    model: _Model,
    *,
    mixout: float | Mixout | None = None,
    rdrop: float | RDrop | None = None,
    anchor: float | Anchor | None = None,
    w_pre: Source | None = None,
    w_pre_device: Literal["same", "cpu"] = "same",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> _Model:
    """Regularize a model's training toward its pretrained weights, in place. No other line of the script changes.

    Mixout, Lee et al., ICLR 2020, arXiv 1909.11299: whenever a layer runs in training mode, its weight is replaced by
    W_mix = w_pre + (w - w_pre) * m / (1 - p) for that call. Parameters stay the same objects, with the same names,
    values and state_dict, so an optimizer made before still works; eval mode is untouched. Masks come from torch's
    global generators: torch.manual_seed rules.

    Mixed are the weights of nn.Linear, transformers' Conv1D, nn.Conv1d and nn.Conv2d, and of an nn.Embedding that
    `include` names or that shares its weight with one of them. Biases, norms, frozen weights, PEFT's adapters and new
    layers are not; a weight that is unfrozen later is mixed from then on. New are the layers that transformers did not
    load, or that are not in `w_pre`; in other models name them in `exclude`. Their dropout is kept.

    Patching again replaces the settings and keeps w_pre, unless another one is given.

    Args:
        model: any nn.Module, before torch.compile; DistributedDataParallel and fully_shard may come before or after.
        mixout: p, or a Mixout. If no regularizer is given: 0.7.
        rdrop: alpha, or an RDrop: every training forward is made twice, and the loss function that its logits reach, in
            the model or outside of it, returns R-Drop's loss, arXiv 2106.14448, eq. 4.
        anchor: weight, or an Anchor: weight decay toward w_pre of the weights chosen here.
        w_pre: the pretrained weights: a Hub id, a folder, a file or a state_dict. Default: those the model has now.
        w_pre_device: "same" keeps w_pre beside the weights and moves it with the model. "cpu" keeps it in the CPU's
            memory, pinned, and copies it to the GPU layer by layer, one ahead.
        include: globs of parameters or modules; if any, only these are mixed. `*` stays within one dotted part of a
            name, `**` spans several.
        exclude: globs of parameters or modules that are not mixed.
    Returns:
        The model itself.
    Raises:
        SettingError: a setting is out of range, a glob matches nothing, or no weight is left to mix.
        SourceError: the model is compiled, wrapped, sharded or swapped in a way that hooks cannot work with, or w_pre
            does not fit. The model is as it was after either.
    """
    put_patch(
        take_root(model),
        mixout=mixout,
        rdrop=rdrop,
        anchor=anchor,
        w_pre=w_pre,
        w_pre_device=w_pre_device,
        include=include,
        exclude=exclude,
    )
    return model


def put_patch(
    root: nn.Module,
    *,
    mixout: float | Mixout | None = None,
    rdrop: float | RDrop | None = None,
    anchor: float | Anchor | None = None,
    w_pre: Source | None = None,
    w_pre_device: Literal["same", "cpu"] = "same",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> None:
    """Do what patch_model does, to what `take_root` has let pass."""
    settings = _settings(mixout, rdrop, anchor)
    _refuse_idle(settings, {"w_pre": w_pre, "include": include, "exclude": exclude})
    if w_pre_device not in ("same", "cpu"):
        raise SettingError(f"w_pre_device: expected same or cpu, got {w_pre_device!r}. Choose one of them.")
    former: Patch | None = root.__dict__.get(PATCH)
    _refuse_others(root, former)
    if former is not None:
        former.reveal()
    orphans = find_orphans(root)
    patch = _plan(
        root,
        former if w_pre is None and former is not None and former.sites else None,
        settings,
        w_pre,
        Offload() if w_pre_device == "cpu" else None,
        include=as_globs("include", include),
        exclude=as_globs("exclude", exclude),
    )
    if former is not None:
        former.detach(root)
    for module in orphans:
        release(module)
    patch.attach(root)


def unpatch_model(model: _Model) -> _Model:
    """Undo patch_model: hooks, dropout rates and w_pre go; parameters are the same objects, with the values they have.

    Does nothing to a model that is not patched, unless it is, or holds, a copy of a part of one that is: that copy is
    made plain as well.

    Raises:
        SourceError: it is a part of a patched model.
    """
    root = _unwrap(model)
    patch: Patch | None = root.__dict__.get(PATCH)
    _refuse_others(root, patch)
    if patch is not None:
        patch.detach(root)
    for module in find_orphans(root):
        release(module)
    return model


@contextmanager
def patched(model: _Model, **settings: Any) -> Iterator[_Model]:
    """Patch a model for the body of a `with`, and restore what it was before, patched or not.

    Args:
        model, settings: as for patch_model.
    """
    former: Patch | None = _unwrap(model).__dict__.get(PATCH)
    patch_model(model, **settings)
    try:
        yield model
    finally:
        unpatch_model(model)
        if former is not None:
            former.attach(_unwrap(model))


def find_patch(model: nn.Module) -> Patch | None:
    """Return the patch of a model, which may have been compiled or wrapped since."""
    patch: Patch | None = _unwrap(model).__dict__.get(PATCH)
    return patch


_Settings = tuple[Mixout | None, RDrop | None, Anchor | None]


def _settings(mixout: float | Mixout | None, rdrop: float | RDrop | None, anchor: float | Anchor | None) -> _Settings:
    if mixout is None and rdrop is None and anchor is None:
        return _DEFAULT, None, None
    return (
        mixout if mixout is None or isinstance(mixout, Mixout) else Mixout(mixout),
        rdrop if rdrop is None or isinstance(rdrop, RDrop) else RDrop(rdrop),
        anchor if anchor is None or isinstance(anchor, Anchor) else Anchor(anchor),
    )


def _refuse_idle(settings: _Settings, given: dict[str, Any]) -> None:
    """Refuse what is of no use to R-Drop alone, which acts on no weight."""
    mixout, _, anchor = settings
    idle = [name for name, value in given.items() if value is not None]
    if mixout is None and anchor is None and idle:
        raise SettingError(
            f"{idle[0]}: expected mixout or anchor, which act on weights, got rdrop alone. Leave {idle[0]} out."
        )


def _unwrap(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise SettingError(f"model: expected an nn.Module, got {type(model).__name__}. Pass the model itself.")
    unwrapped: nn.Module = unwrap(model)
    return unwrapped


def take_root(model: Any, *, may_be_compiled: bool = False) -> nn.Module:
    """Return the model within DistributedDataParallel; refuse what hooks cannot work with.

    Args:
        may_be_compiled: the caller has torch.compile forget the graphs it has made.
    """
    root = _unwrap(model)
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
        if type(module).__name__ == "FullyShardedDataParallel":
            raise SourceError(
                f"{path}: expected whole weights or FSDP 2, got FSDP 1, which flattens them. Use fully_shard."
            )
    return root


def is_compiled(module: nn.Module) -> bool:
    """Tell whether torch.compile was given a module, by either of its two ways."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _refuse_others(root: nn.Module, own: Patch | None) -> None:
    """Refuse modules that belong to the patch of another model: one of the two would undo the other."""
    ours = {id(site) for site in own.sites} if own else set()
    ours |= {id(module.__dict__.get(SITE)) for module in find_orphans(root)}
    for name, module in root.named_modules():
        site = module.__dict__.get(SITE)
        if (module is not root and PATCH in module.__dict__) or (site is not None and id(site) not in ours):
            raise SourceError(
                f"{name or type(root).__name__}: expected modules of one patched model, got one that patch_model has "
                "patched as a part of another. Call unpatch_model on that one first."
            )


def _refuse_split(targets: Sequence[Target], offload: Offload | None) -> None:
    split = [target.name for target in targets if is_distributed(target.weight)]
    if offload is not None and split:
        raise SettingError(
            f"w_pre_device: expected same for weights that fully_shard has split, got cpu ({some(split)}). "
            "Leave it out: w_pre is split as they are."
        )


def _plan(
    root: nn.Module,
    former: Patch | None,
    settings: _Settings,
    w_pre: Source | None,
    offload: Offload | None,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
) -> Patch:
    """Choose the weights and take their w_pre, without touching the model."""
    mixout, rdrop, anchor = settings
    drop = _drop(rdrop, mixout)
    forward = Pass()
    if mixout is None and anchor is None:
        return Patch(mixout=None, anchor=None, drop=drop, sites=[], left={}, fresh=set(), label="", forward=forward)
    origin = Kept(former.sites, former.fresh, former.label) if former else open_origin(root, w_pre)
    choice = choose(root, origin.fresh, include=include, exclude=exclude)
    refuse_unready(choice.targets)
    _refuse_split(choice.targets, offload)
    for target in choice.targets:
        refuse_not_finite(target.name, target.weight)
    sites = {target.name: Site(target, mixout, offload, forward) for target in choice.targets}
    for site in former.sites if former else []:
        if site.name in sites and site.pretrained is None:
            sites[site.name].follow(site)
    wanted = [target for target in choice.targets if target.weight.requires_grad or w_pre is not None]
    for target, values in origin.read(wanted):
        refuse_not_finite(f"w_pre: {target.name}", values)
        sites[target.name].take(values, is_own=origin.is_own)
    return Patch(
        mixout=mixout,
        anchor=anchor,
        drop=drop,
        sites=list(sites.values()),
        left=choice.left,
        fresh=origin.fresh,
        label=origin.label,
        forward=forward,
    )


def _drop(rdrop: RDrop | None, mixout: Mixout | None) -> Any:
    if rdrop is None:
        return None
    from .rdrop.regularizer import Drop  # imports torch's compiler, which takes a second

    return Drop(rdrop, is_mixed=mixout is not None and mixout.p > 0)
