"""Which parameters of a model methods act on, and why not the others: by layer, include and exclude, and newness."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from surgery.errors import SettingError, SourceError
from surgery.globs import matches
from surgery.live.foreign import is_flat
from surgery.live.zero3 import shape_of

from .layers import (
    CONVOLUTIONS,
    Shape,
    has_old_weight_norm,
    is_conv1d,
    is_part_of_weight,
    is_read_by_attention,
    mask_shape,
    packing,
)
from .lora import LoraWeight, find_lora
from .peft_layers import adapter_names, is_wrapper

Scope = Literal["layers", "parameters"]
"""The weights of linear, convolution and embedding layers, or every parameter."""

NEW = "new: it has no pretrained value"
EXCLUDED = "in exclude"
_OF_PEFT = "PEFT's own: "
ADAPTER = f"{_OF_PEFT}an adapter"
_BESIDE_FROZEN = (
    "PEFT trains its adapters, and keeps the weights that they are added to frozen: of adapters, W0 + s B A of plain "
    "LoRA alone is acted on"
)
_NOT_A_WEIGHT = "bias, norm or another vector"
_UNKNOWN = "of {}, a kind of layer that is not mixed"
_EMBEDDING = "embedding: name it in include to mix it"
NOT_INCLUDED = "not in include"
_RENORMALIZED = "embedding with max_norm, which renormalizes its weight in place as it is used"
_COMPLEX = "of complex numbers"
_QUANTIZED = "quantized to {}"
_PARAMETRIZED = "part of a weight that parametrize or weight_norm computes anew at each call"
_IN_ATTENTION = "read by nn.MultiheadAttention without a call of the layer, so that no hook fires"


@dataclass
class Target:
    """One parameter that methods act on, with the modules that use it; tied ones are one target.

    Args:
        name: its first name in the model.
        names: all of them.
        owners: the modules that hold it, as `attribute`.
        mask: shape of the mask per input feature, and the repeats of its rows; None: it is not a layer's weight to mix.
        owner_names: its first name in each of the owners.
    """

    name: str
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    mask: tuple[Shape, int] | None
    attribute: str = "weight"
    owner_names: tuple[str, ...] = ()

    @property
    def weight(self) -> torch.Tensor:
        """The live parameter."""
        return own_weight(self.name, self.owners[0], self.attribute)


def own_weight(name: str, module: nn.Module, attribute: str = "weight") -> torch.Tensor:
    """Return a layer's parameter, or the tensor that torch.func.functional_call puts in its place.

    Raises:
        SourceError: another tool has taken it away since the model was patched.
    """
    w = module._parameters.get(attribute)
    if w is None or (not isinstance(w, nn.Parameter) and is_flat(w._base)):
        raise SourceError(
            f"{name}: expected the layer's own parameter, got none. DataParallel, FSDP 1 and parametrizations "
            "take it away: use DistributedDataParallel or fully_shard, and patch after parametrizing."
        )
    return w


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
    _check_globs([name for names in groups.values() for name, _ in names], include=include, exclude=exclude)
    adapters = dict.fromkeys(adapter_names(model), ADAPTER)
    selection = Selection([], {scope: {} for scope in scopes}, [])
    if "layers" in scopes:
        selection.lora, reasons_of_lora = _select_lora(model, fresh, include, exclude)
        adapters |= {name: reasons_of_lora.get(name, why) for name, why in adapters.items()}
    of_lora = {name for one in selection.lora for name in one.names}
    for members in groups.values():
        names = tuple(name for name, _ in members)
        if not of_lora.isdisjoint(names):
            for left in (selection.left[scope] for scope in scopes if scope != "layers"):
                left |= dict.fromkeys(names, ADAPTER)
            continue
        reason = excluded(names, include, exclude)
        if reason is None and not adapters.keys().isdisjoint(names):
            reason = next(adapters[name] for name in names if name in adapters)
        if reason is None and fresh >= set(names):
            reason = NEW
        kind = _kind(members, is_requested=bool(include))
        reasons: dict[Scope, str | None] = {
            "layers": kind if isinstance(kind, str) else None,
            "parameters": _unfit(members),
        }
        reasons = {scope: reason or reasons[scope] for scope in scopes}
        for scope, why in reasons.items():
            if why is not None:
                selection.left[scope] |= dict.fromkeys(names, why)
        if None in reasons.values():
            is_layer = "layers" in scopes and reasons["layers"] is None
            mask = kind if is_layer and not isinstance(kind, str) else None
            selection.targets.append(_target(members, mask))
    if "layers" in scopes:
        _refuse_swapped(model, include, exclude)
    _refuse_nothing(model, selection, [*include, *exclude], may_wait=may_wait and not adapters)
    return selection


def _select_lora(
    model: nn.Module, fresh: AbstractSet[str], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[LoraWeight], dict[str, str]]:
    """Return the weights of LoRA to act on, and why the factors of others are left alone, by name."""
    found, unfit = find_lora(model)
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
    for path, why in unfit.items():
        adapters = adapter_names(model.get_submodule(path))
        reasons |= {f"{path}.{name}".lstrip("."): f"{_OF_PEFT}{why}" for name in adapters}
    return chosen, reasons


def _target(members: Sequence[tuple[str, nn.Module]], mask: tuple[Shape, int] | None) -> Target:
    """Make a target of a parameter's names; of one to mix, the owners are those that call it `weight`."""
    attribute = "weight" if mask is not None else members[0][0].rpartition(".")[2]
    owners: dict[nn.Module, str] = {}
    for name, module in members:
        if name.rpartition(".")[2] == attribute:
            owners.setdefault(module, name)
    names = tuple(name for name, _ in members)
    return Target(names[0], names, tuple(owners), mask, attribute, tuple(owners.values()))


def _tied(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Group the names of parameters, each with its module, by the parameter they name."""
    groups: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                groups.setdefault(id(parameter), []).append((f"{path}.{name}".lstrip("."), module))
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


def _kind(members: Sequence[tuple[str, nn.Module]], *, is_requested: bool) -> tuple[Shape, int] | str:
    """Return the mask's shape, or why a parameter is never mixed. A linear layer's view of a tied weight goes first."""
    if all(is_part_of_weight(module, name.rpartition(".")[2]) for name, module in members):
        return _PARAMETRIZED
    weights = [module for name, module in members if name.rpartition(".")[2] == "weight"]
    shapes = [(module, shape) for module in weights if (shape := mask_shape(module))]
    linear = [(module, shape) for module, shape in shapes if not isinstance(module, nn.Embedding)]
    if not shapes:
        name, module = members[0]
        is_vector = len(shape_of(module._parameters[name.rpartition(".")[2]])) < 2
        return _NOT_A_WEIGHT if is_vector else _UNKNOWN.format(type(module).__name__)
    module, shape = (linear or shapes)[0]
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.is_complex():
        return _COMPLEX
    if packed := packing(weight):
        return _QUANTIZED.format(packed)
    if any(getattr(module, "max_norm", None) is not None for module, _ in shapes):
        return _RENORMALIZED
    if not linear and not is_requested:
        return _EMBEDDING
    return _IN_ATTENTION if is_read_by_attention(module) else shape


def _unfit(members: Sequence[tuple[str, nn.Module]]) -> str | None:
    """Return why no method can act on a parameter, whatever it is for."""
    name, module = members[0]
    weight = module._parameters[name.rpartition(".")[2]]
    assert weight is not None
    if weight.is_complex():
        return _COMPLEX
    packed = packing(weight)
    return _QUANTIZED.format(packed) if packed else None


def _check_globs(names: Sequence[str], **globs: Sequence[str]) -> None:
    for option, given in globs.items():
        for glob in given:
            if not any(is_match(glob, name) for name in names):
                raise SettingError(
                    f"{option} {glob!r}: expected a glob that matches a parameter or a module, got none of "
                    f"{len(names)}, such as {(names or ['nothing'])[0]!r}. `*` stays within one dotted part of a name, "
                    "`**` spans several."
                )


def _refuse_swapped(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse a layer whose weight another tool swaps: the hooks of two tools would undo each other."""
    for path, module in model.named_modules():
        name = f"{path}.weight".lstrip(".")
        is_linear = isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_conv1d(module)
        if not is_linear or is_wrapper(module) or excluded([name], include, exclude):
            continue
        if hasattr(module, "parametrizations") or has_old_weight_norm(module):
            continue  # it has parameters of its own, which are named as not mixed
        if module._parameters.get("weight") is None:
            fault = "one that another tool swaps in (spectral_norm, FSDP 1, pruning)"
        elif "weight" in module.__dict__:
            fault = "one that another tool put before it"
        else:
            continue
        raise SourceError(
            f"{name}: expected the layer's own parameter, got {fault}. Remove it first, or name {path!r} in exclude."
        )


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
    if scope == "layers" and _EMBEDDING in left.values():
        ways.append("name an embedding in include")
    if scope == "layers" and trained - {NEW, EXCLUDED, NOT_INCLUDED, _EMBEDDING}:
        ways.append("take recadam, which acts on all kinds of weights")
    said = ", or ".join(ways or ["unfreeze a weight"])
    return said[0].upper() + said[1:]
