"""describe and stats: what patch_model did to a model, as data and in words, and what is measured of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.display import Brief, as_html
from surgery.errors import SettingError, by_reason, some
from surgery.live.parts import unwrap
from surgery.live.zero3 import size_of
from surgery.sizes import as_bytes

from .lifecycle import Patch
from .marks import PATCH, Part, find_orphans
from .patch import find_patch
from .registry import METHODS
from .regularizer import Settings, first_of
from .weights.selection import ADAPTER, Scope


@dataclass(frozen=True, repr=False)
class Acted(Brief):
    """The weights of one scope that methods act on.

    Args:
        verb: what the first of these methods does to them.
        names: of the weights.
        lora: those of them that LoRA trains while they are frozen themselves.
        tied: further names of these weights.
        elements: how many elements they have.
        left: why each other parameter is left alone, by name.
    """

    verb: str = ""
    names: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    elements: int = 0
    left: Mapping[str, str] | None = None


_NONE = Acted()


@dataclass(frozen=True, repr=False)
class Description(Brief):
    """What is patched, what is not, and why. str() lays it out for people.

    Each method of the registry adds an attribute of its name, its settings or None, and its facts, `idle_facts` of its
    Settings. Those of Mixout are `uncalled`, weights whose layers no forward in training mode has called yet, once
    there was one, `uncalled_ties`, names in such layers of weights that other layers are called with, `replaced` and
    `kept`, names of the dropout rates set to 0 and of those that stay, and `unmixed`, optimizer steps without it; of
    R-Drop `fired`, forwards that its KL was a part of, `missed`, optimizer steps without it after some with it, and
    `unjoined`, names of losses that it has no formula for; of the anchor `anchored`, optimizer steps that it acted in.

    Args:
        settings: of the methods at work; none if the model is not patched.
        facts: theirs.
        acted: the weights that they act on, by scope.
        of_elements: how many elements the model's parameters have.
        w_pre: where the pretrained weights come from.
        w_pre_bytes: what they take on this rank, in bytes.
        w_pre_device: where they lie.
        is_w_pre_lost: they have stayed behind a pickle.
        elsewhere: of a model that is not patched itself: what of it, or around it, is.
    """

    settings: tuple[Settings, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    acted: Mapping[Scope, Acted] = field(default_factory=dict)
    of_elements: int = 0
    w_pre: str = ""
    w_pre_bytes: int = 0
    w_pre_device: str = ""
    is_w_pre_lost: bool = False
    elsewhere: str = ""

    @property
    def mixed(self) -> tuple[str, ...]:
        """Names of the layers' weights that mixout or the anchor acts on, W0 of those that LoRA trains."""
        return self._layers.names

    @property
    def tied(self) -> tuple[str, ...]:
        """Further names of these weights."""
        return self._layers.tied

    @property
    def elements(self) -> int:
        """How many elements these weights have."""
        return self._layers.elements

    @property
    def left(self) -> Mapping[str, str] | None:
        """Why each other parameter is left alone, by name."""
        if self.settings and not self.acted:
            return {}
        return (self.acted.get("layers") or self.acted.get("parameters") or _NONE).left

    @property
    def _layers(self) -> Acted:
        return self.acted.get("layers") or _NONE

    def __getattr__(self, name: str) -> Any:
        """Return a method's settings or one of its facts."""
        for kind in METHODS:
            if name == kind.name:
                return next((one for one in self.settings if isinstance(one, kind)), None)
            if name in kind.idle_facts:
                return self.facts.get(name, kind.idle_facts[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        if not self.settings:
            return self._absence
        return "\n".join(f"{label:12} {text}" for label, text in self._lines())

    def _repr_html_(self) -> str:
        lines = self._lines() if self.settings else []
        return as_html([] if self.settings else [self._absence], ("", ""), lines, tuple)

    @property
    def _absence(self) -> str:
        return f"not patched{self.elsewhere and ' itself, but '}{self.elsewhere}"

    def _lines(self) -> list[tuple[str, str]]:
        aside = [one for one in self.settings if one.acts_on is None]
        lines = [line for one in aside for line in one.lines(self.facts)]
        lines += [line for one in self.settings if one not in aside for line in one.lines(self.facts)]
        if self.acted:
            lines += self._weight_lines()
        return lines + [line for one in self.settings for line in one.lines_below(self.facts)]

    def _weight_lines(self) -> list[tuple[str, str]]:
        lines: list[tuple[str, str]] = []
        for acted in self.acted.values():
            share = f"{acted.elements:,} of {self.of_elements:,} elements"
            lines.append((acted.verb, f"{len(acted.names)} weights, {share}: {first_of(acted.names) or _NOTHING}"))
            if acted.lora:
                lines.append(("", f"{len(acted.lora)} by LoRA, which keeps them frozen: {first_of(acted.lora)}"))
            if acted.tied:
                lines.append(("", f"{len(acted.tied)} more names for them (tied): {first_of(acted.tied)}"))
        where = f"{as_bytes(self.w_pre_bytes)} on {self.w_pre_device or 'no device'}"
        if not self.w_pre_device and any(acted.lora for acted in self.acted.values()):
            where = "no copy, for they are frozen"
        lines.append(("w_pre", f"{self.w_pre}; {_LOST if self.is_w_pre_lost else where}"))
        for acted in self.acted.values():
            for reason, names in by_reason((acted.left or {}).items()).items():
                lines.append((f"not {acted.verb}", f"{len(names)} ({reason}): {first_of(names)}"))
        return lines


_LOST = "MISSING: a pickle does not carry it. Call patch_model with w_pre and all settings again"
_NOTHING = "NOTHING IS REGULARIZED, for all of them are frozen"


def describe(model: nn.Module) -> Description:
    """Say what patch_model has done to a model. Of one that is not patched, nothing, but where in it one is."""
    patch = find_patch(model)
    root = unwrap(model)
    if patch is None:
        return Description(elsewhere=_elsewhere(root))
    facts: dict[str, Any] = {}
    for regularizer in patch.regularizers:
        facts |= regularizer.facts(root)
    if patch.weights is None:
        return Description(patch.settings, facts)
    acted = {scope: _acted(root, patch, scope) for scope in patch.weights.left}
    shown = {name for one in acted.values() for name in one.names}
    kept = [one.pretrained for one in patch.weights.tracked if one.name in shown and one.pretrained is not None]
    kept += [start for one in patch.weights.lora if one.name in shown for start in one.kept]
    devices = {str(one.values.device) for one in kept if one.values is not None}
    return Description(
        patch.settings,
        facts,
        acted,
        of_elements=sum(map(size_of, model.parameters())),
        w_pre=patch.weights.label,
        w_pre_bytes=patch.weights.nbytes,
        w_pre_device=", ".join(sorted(devices)),
        is_w_pre_lost=any(one.values is None for one in kept),
    )


_FROZEN = "frozen: {} once it is trainable"
_GONE = "its layer has been replaced since patch_model: call it again"
_ADDED = "added since patch_model: call it again"


def _acted(root: nn.Module, patch: Patch, scope: Scope) -> Acted:
    """Say which weights of a scope are acted on, and why not the others: frozen, gone from the model, or new in it."""
    assert patch.weights is not None
    tracked = patch.weights.of(scope)
    verb = next(one.verb for one in patch.settings if one.acts_on == scope)
    modules = set(root.modules())
    gone = {one.name: _GONE for one in tracked if modules.isdisjoint(one.target.owners)}
    frozen = {
        name: _FROZEN.format(verb) for one in tracked if not one.weight.requires_grad for name in one.target.names
    }
    known = {id(one.weight) for one in tracked if one.name not in gone}
    left = dict(patch.weights.left[scope])
    of_lora = [one for one in patch.weights.lora if scope == "layers"]
    lora = [one for one in of_lora if one.is_trainable and one.module in modules]
    for one in of_lora:
        known |= {id(module.weight) for module in one.modules}
        if one.module not in modules:
            gone |= dict.fromkeys(one.names, _GONE)
        elif one not in lora:
            left |= dict.fromkeys(one.names, ADAPTER if _is_trainable(one.base) else _FROZEN.format(verb))
    frozen = {name: why for name, why in frozen.items() if name not in {one.name for one in lora}}
    added = {
        name: _ADDED
        for name, parameter in root.named_parameters()
        if id(parameter) not in known and name not in left and name not in gone
    }
    active = [one for one in tracked if one.weight.requires_grad and one.name not in gone]
    names = tuple(one.name for one in lora)
    elements = [size_of(one.weight) for one in active] + [size_of(w) for one in lora for w in one.parameters]
    return Acted(
        verb,
        (*(one.name for one in active), *names),
        names,
        tuple(name for one in active for name in one.target.names[1:]),
        sum(elements),
        {name: why for name, why in (left | frozen | gone | added).items() if name not in names},
    )


def _is_trainable(w: torch.Tensor | None) -> bool:
    return w is not None and w.requires_grad


def _elsewhere(root: nn.Module) -> str:
    """Say what patches act in a model that has none of its own."""
    parts = [name for name, module in root.named_modules() if PATCH in module.__dict__]
    if parts:
        return f"its part {some(parts)} is" if len(parts) == 1 else f"its parts {some(parts)} are"
    if find_orphans(root):
        return "copied, loaded or kept from a model that is: call unpatch_model or patch_model on it"
    return "a part of a model that is" if any(Part.attribute in module.__dict__ for module in root.modules()) else ""


def stats(model: nn.Module) -> dict[str, Any]:
    """Measure a patched model. Under FSDP every rank must call it.

    Returns:
        steps: forward passes in training mode since it was patched; mixed: number of weights that mixout or anchor acts
        on; w_pre_bytes: on this rank; distance: ||w - w_pre||_2 over all weights that a method acts on, in float64.
        With rdrop also: kl, ce: the symmetric KL, without alpha, and the mean cross-entropy of the last forward on this
        rank, as the loss has them (mean over the losses, if it has several); kl_mean, ce_mean: over all forwards since
        they were last read; None where there were none. With mse_loss they are pair_mse, the mean squared difference of
        the two outputs, and mse. rdrop_fired: forwards that the KL was a part of.
        What other methods add, their cards say.
    Raises:
        SettingError: the model is not patched.
    """
    patch = find_patch(model)
    if patch is None:
        raise SettingError(
            f"{type(model).__name__}: expected a patched model, got one that is {describe(model)}. Call patch_model."
        )
    weights = patch.weights
    figures: dict[str, Any] = {
        "steps": patch.forwards.count,
        "mixed": len(describe(model).mixed),
        "w_pre_bytes": weights.nbytes if weights is not None else 0,
        "distance": weights.distance() if weights is not None else 0.0,
    }
    for regularizer in patch.regularizers:
        figures |= regularizer.figures()
    return figures
