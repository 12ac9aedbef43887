"""patch_model, unpatch_model, patched: check everything, then attach a Patch to the model, or leave it as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import nn

from surgery.errors import SettingError
from surgery.noisytune import as_globs

from .anchor.settings import Anchor
from .checks import refuse_amid_forward, refuse_others, root_of, take_root
from .lifecycle import Patch
from .marks import PATCH, find_orphans, release
from .mixout.settings import Mixout
from .rdrop.settings import RDrop
from .recadam.settings import RecAdam
from .registry import METHODS, as_settings, bind
from .regularizer import Settings
from .trackers.install import install
from .weights.chosen import choose
from .weights.offload import Offload
from .weights.sources import Source

_Model = TypeVar("_Model", bound=nn.Module)
_DEFAULT = Mixout(0.7)


def patch_model(
    model: _Model,
    *,
    mixout: float | Mixout | None = None,
    rdrop: float | RDrop | None = None,
    anchor: float | Anchor | None = None,
    recadam: float | RecAdam | None = None,
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

    Mixed are the weights of nn.Linear, transformers' Conv1D, nn.Conv1d to nn.Conv3d, and of an nn.Embedding that
    `include` names or that shares its weight with one of them, and those that PEFT's LoRA trains. Biases, norms, frozen
    weights, other adapters and new layers are not; a weight that is unfrozen later is mixed from then on. New are the
    layers that transformers did not load, or that are not in `w_pre`; in other models name them in `exclude`. Their
    dropout is kept.

    Patching again replaces the settings and keeps w_pre, unless another one is given.

    Args:
        model: any nn.Module, before torch.compile; DistributedDataParallel, fully_shard and DeepSpeed may come before
            it or after it.
        mixout: p, or a Mixout. If no regularizer is given: 0.7.
        rdrop: alpha, or an RDrop: every training forward is made twice, and the loss function that its logits reach, in
            the model or outside of it, returns R-Drop's loss, arXiv 2106.14448, eq. 4.
        anchor: weight, or an Anchor: weight decay toward w_pre of the weights chosen here.
        recadam: gamma, or a RecAdam, arXiv 2004.12651: at first every parameter with a pretrained value is recalled
            toward it, biases, norms and embeddings too; then optimizer steps become what they are without it.
        w_pre: the pretrained weights: a Hub id, a folder, a file or a state_dict. Default: those the model has now.
        w_pre_device: "same" keeps w_pre beside the weights and moves it with the model. "cpu" keeps it in the CPU's
            memory, pinned, and copies it to the GPU layer by layer, one ahead.
        include: globs of parameters or modules; if any, methods act on these only. `*` stays within one dotted part of
            a name, `**` spans several.
        exclude: globs of parameters or modules that no method acts on.
    Returns:
        The model itself.
    Raises:
        SettingError: a setting is out of range, a glob matches nothing, or no weight is left to mix.
        SourceError: the model is compiled, wrapped, sharded or swapped in a way that hooks cannot work with, or w_pre
            does not fit. The model is as it was after either.
    """
    settings = as_settings({"mixout": mixout, "rdrop": rdrop, "anchor": anchor, "recadam": recadam})
    put_patch(
        take_root(model),
        settings or (_DEFAULT,),
        w_pre=w_pre,
        w_pre_device=w_pre_device,
        include=include,
        exclude=exclude,
    )
    return model


def put_patch(
    root: nn.Module,
    settings: tuple[Settings, ...],
    *,
    w_pre: Source | None = None,
    w_pre_device: Literal["same", "cpu"] = "same",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    may_wait: bool = False,
) -> None:
    """Do what patch_model does, to what `take_root` has let pass.

    Args:
        may_wait: weights that are all frozen are no error: they may be trained later.
    """
    _refuse_idle(settings, {"w_pre": w_pre, "include": include, "exclude": exclude})
    if w_pre_device not in ("same", "cpu"):
        raise SettingError(f"w_pre_device: expected same or cpu, got {w_pre_device!r}. Choose one of them.")
    former = find_patch(root)
    refuse_others(root, former)
    refuse_amid_forward(root)
    if former is not None:
        former.abort()
    orphans = find_orphans(root)
    scopes = {one.acts_on for one in settings if one.acts_on is not None}
    weights = None
    if scopes:
        weights = choose(
            root,
            scopes,
            former.weights if former is not None else None,
            w_pre=w_pre,
            offload=Offload() if w_pre_device == "cpu" else None,
            include=as_globs("include", include),
            exclude=as_globs("exclude", exclude),
            may_wait=may_wait,
        )
    patch = Patch(settings, [bind(one, weights if one.acts_on else None, settings) for one in settings], weights)
    if former is not None:
        former.detach(root)
    for module in orphans:
        release(module)
    patch.attach(root)
    install()


def unpatch_model(model: _Model) -> _Model:
    """Undo patch_model: hooks, dropout rates and w_pre go; parameters are the same objects, with the values they have.

    Does nothing to a model that is not patched, unless it is, or holds, a copy of a part of one that is: that copy is
    made plain as well.

    Raises:
        SourceError: it is a part of a patched model, or amid a forward.
    """
    root = root_of(model)
    patch = find_patch(root)
    refuse_others(root, patch)
    refuse_amid_forward(root)
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
    former = find_patch(model)
    patch_model(model, **settings)
    try:
        yield model
    finally:
        unpatch_model(model)
        if former is not None:
            former.attach(root_of(model))


def find_patch(model: nn.Module) -> Patch | None:
    """Return the patch of a model, which may have been compiled or wrapped since."""
    patch: Patch | None = root_of(model).__dict__.get(PATCH)
    return patch


def _refuse_idle(settings: Sequence[Settings], given: dict[str, Any]) -> None:
    """Refuse what is of no use to methods that act on no weight, such as R-Drop alone."""
    idle = [name for name, value in given.items() if value is not None]
    if idle and all(one.acts_on is None for one in settings):
        *acting, last = (kind.name for kind in METHODS if kind.acts_on is not None)
        raise SettingError(
            f"{idle[0]}: expected {', '.join(acting)} or {last}, which act on weights, got "
            f"{' and '.join(one.name for one in settings)} alone. Leave {idle[0]} out."
        )
