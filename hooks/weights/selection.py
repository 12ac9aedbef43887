"""Which parameters of a model methods act on, and why not the others: by layer, include and exclude, and newness."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from torch import nn

from surgery.errors import SettingError, SourceError
from surgery.globs import matches

from .kinds import EMBEDDING, mask_of, unfit
from .layers import Shape, feature_axes, find_readers, has_old_weight_norm, packing
from .lora import LoraWeight, find_lora
from .peft_layers import adapter_names, find_swapped, is_wrapper
from .target import Place, Target

Scope = Literal["layers", "parameters"]
"""The weights of layers that can be mixed, or every parameter."""

NEW = "new: it has no pretrained value"
EXCLUDED = "in exclude"
_OF_PEFT = "PEFT's own: "
ADAPTER = f"{_OF_PEFT}an adapter"
_BESIDE_FROZEN = (
    "PEFT trains its adapters, and keeps the weights that they are added to frozen: of adapters, W0 + s B A of plain "
    "LoRA alone is acted on"
)
NOT_INCLUDED = "not in include"


@dataclass
class Selection:
    """What becomes of a model's parameters.

    Args:
        targets: what is acted on as long as it is trainable.
        left: why each other parameter is not acted on, by scope and name.
        lora: weights that LoRA trains, which are acted on as long as it does.
    """

    targets: list[Target]
    left: dict[Scope, dict[str, str]]
    lora: list[LoraWeight]


def select(
    model: nn.Module,
    fresh: AbstractSet[str],
    scopes: Collection[Scope],
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    may_wait: bool = False,
) -> Selection:
    """Choose the weights to act on.

    Args:
        fresh: names of parameters without a pretrained value.
        scopes: "layers" for the weights of layers that can be mixed, "parameters" for all.
        include, exclude: globs that match a parameter's name or that of a module around it.
        may_wait: all of them may be frozen, unless it was PEFT that froze them: then they are never trained.
    Raises:
        SettingError: a glob matches nothing, or no weight is left to act on.
        SourceError: a weight to mix is already swapped by another tool, or is not in memory.
    """
    groups = _tied(model)
    _check_globs([place.name for places in groups.values() for place in places], include=include, exclude=exclude)
    swapped = find_swapped(model)
    adapters = dict.fromkeys(adapter_names(model), ADAPTER)
    selection = Selection([], {scope: {} for scope in scopes}, [])
    if "layers" in scopes:
        selection.lora, reasons_of_lora = _select_lora(model, fresh, include, exclude)
        adapters |= {name: reasons_of_lora.get(name, why) for name, why in adapters.items()}
    of_lora = {name for one in selection.lora for name in one.names}
    for places in groups.values():
        names = tuple(place.name for place in places)
        if not of_lora.isdisjoint(names):
            for left in (selection.left[scope] for scope in scopes if scope != "layers"):
                left |= dict.fromkeys(names, ADAPTER)
            continue
        reason = excluded(names, include, exclude)
        if reason is None and not adapters.keys().isdisjoint(names):
            reason = next(adapters[name] for name in names if name in adapters)
        if reason is None and fresh >= set(names):
            reason = NEW
        mask = mask_of(places, swapped, is_requested=bool(include))
        reasons: dict[Scope, str | None] = {
            "layers": mask if isinstance(mask, str) else None,
            "parameters": unfit(places[0]),
        }
        reasons = {scope: reason or reasons[scope] for scope in scopes}
        for scope, why in reasons.items():
            if why is not None:
                selection.left[scope] |= dict.fromkeys(names, why)
        if None in reasons.values():
            is_layer = "layers" in scopes and reasons["layers"] is None
            selection.targets.append(_target(places, mask if is_layer and not isinstance(mask, str) else None))
    if "layers" in scopes:
        _refuse_swapped(model, swapped, include, exclude)
    _refuse_nothing(model, selection, [*include, *exclude], may_wait=may_wait and not adapters)
    return selection


def _select_lora(
    model: nn.Module, fresh: AbstractSet[str], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[LoraWeight], dict[str, str]]:
    """Return the weights of LoRA to act on, and why the factors of others are left alone, by name."""
    found, unknown = find_lora(model)
    chosen = []
    reasons: dict[str, str] = {}
    for one in found:
        reason = excluded((one.name, *one.names), include, exclude)
        if reason is None and one.name in fresh and one.base is not None and packing(one.base) is None:
            reason = NEW
        if reason is None:
            one.refuse_merged()
            chosen.append(one)
        reasons |= dict.fromkeys(one.names, reason) if reason is not None else {}
    for path, why in unknown.items():
        adapters = adapter_names(model.get_submodule(path))
        reasons |= {f"{path}.{name}".lstrip("."): f"{_OF_PEFT}{why}" for name in adapters}
    return chosen, reasons


def _target(places: Sequence[Place], mask: tuple[Shape, int] | None) -> Target:
    """Make a target of the places of a parameter; of one to mix, of those that can be, once for each layer."""
    names = tuple(place.name for place in places)
    kept: dict[tuple[nn.Module, str], Place] = {}
    for place in places:
        if mask is None or place.attribute in feature_axes(place.module):
            kept.setdefault((place.module, place.attribute), place)
    return Target(names[0], names, tuple(kept.values()), mask)


def _tied(model: nn.Module) -> dict[int, list[Place]]:
    """Group the places of parameters by the parameter that they hold."""
    readers = find_readers(model)
    groups: dict[int, list[Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                place = Place(f"{path}.{attribute}".lstrip("."), module, attribute, readers.get(module, module))
                groups.setdefault(id(parameter), []).append(place)
    return groups


def excluded(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Return why globs leave out what has these names; None if they do not."""
    if any(is_match(glob, name) for glob in exclude for name in names):
        return EXCLUDED
    if include and not any(is_match(glob, name) for glob in include for name in names):
        return NOT_INCLUDED
    return None


def is_match(glob: str, name: str) -> bool:
    """Tell whether a glob matches a parameter's name, or that of a module that holds it: `head` is all of `head.*`."""
    parts = name.split(".")
    return any(matches(glob, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _check_globs(names: Sequence[str], **globs: Sequence[str]) -> None:
    for option, given in globs.items():
        for glob in given:
            if not any(is_match(glob, name) for name in names):
                raise SettingError(
                    f"{option} {glob!r}: expected a glob that matches a parameter or a module, got none of "
                    f"{len(names)}, such as {(names or ['nothing'])[0]!r}. `*` stays within one dotted part of a name, "
                    "`**` spans several."
                )


def _refuse_swapped(
    model: nn.Module, swapped: AbstractSet[nn.Module], include: Sequence[str], exclude: Sequence[str]
) -> None:
    """Refuse a layer whose weight another tool swaps: the hooks of two tools would undo each other."""
    for path, module in model.named_modules():
        if module in swapped or is_wrapper(module) or isinstance(module, nn.Embedding):
            continue
        for attribute in feature_axes(module):
            name = f"{path}.{attribute}".lstrip(".")
            if not excluded([name], include, exclude) and (fault := _swapped_in(module, attribute)):
                raise SourceError(
                    f"{name}: expected the layer's own parameter, got {fault}. Remove it first, or name {path!r} in "
                    "exclude."
                )


def _swapped_in(module: nn.Module, attribute: str) -> str | None:
    """Say what another tool has put in the place of a weight."""
    if hasattr(module, "parametrizations") or has_old_weight_norm(module, attribute):
        return None  # it has parameters of its own, which are named as not mixed
    if attribute not in module._parameters:
        return "one that another tool swaps in (spectral_norm, FSDP 1, pruning)"
    return "one that another tool put before it" if attribute in module.__dict__ else None


def _refuse_nothing(model: nn.Module, selection: Selection, globs: Sequence[str], *, may_wait: bool) -> None:
    for scope, left in selection.left.items():
        targets = [one for one in selection.targets if scope == "parameters" or one.mask is not None]
        if any(may_wait or target.weight.requires_grad for target in targets):
            continue
        if scope == "layers" and any(one.is_trainable for one in selection.lora):
            continue
        reasons = Counter([*left.values(), *("frozen" for _ in targets)])
        told = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        verb = "mix" if scope == "layers" else "recall"
        remedy = "Correct include and exclude" if globs else _remedy(model, left, scope, is_any_frozen=bool(targets))
        raise SettingError(
            f"model: expected a trainable weight to {verb}, got none ({told or 'no parameters'}). {remedy}."
        )


def _remedy(model: nn.Module, left: Mapping[str, str], scope: Scope, *, is_any_frozen: bool) -> str:
    """Say what to do where nothing is left to act on, by what is trained instead."""
    trained = {left.get(name) for name, w in model.named_parameters(remove_duplicate=False) if w.requires_grad}
    if any(reason is not None and reason.startswith(_OF_PEFT) for reason in trained):
        return f"{_BESIDE_FROZEN}. Leave it out, or name pretrained layers in PEFT's modules_to_save"
    ways = ["unfreeze a weight"] if is_any_frozen else []
    if scope == "layers" and EMBEDDING in left.values():
        ways.append("name an embedding in include")
    if scope == "layers" and trained - {NEW, EXCLUDED, NOT_INCLUDED, EMBEDDING}:
        ways.append("take recadam, which acts on all kinds of weights")
    said = ", or ".join(ways or ["unfreeze a weight"])
    return said[0].upper() + said[1:]
