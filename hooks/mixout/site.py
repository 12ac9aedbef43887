"""Mixout on a live model: hooks that put W_mix in the place of a layer's weight for the time of its forward."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.errors import SourceError

from ..marks import Mark
from ..settings import Mixout
from ..weights.offload import Offload
from ..weights.pretrained import Pretrained, keep
from ..weights.selection import Target, own_weight
from .masks import Chance, Draw, SharedSeeds, draw_mask, draw_seed
from .mixing import Rule, mixed_weight

SITE = "_surgery_site"
"""The attribute of a mixed module that holds its Site."""


@dataclass
class Pass:
    """The forward passes of the patched model in training mode, and whether a pass is under way."""

    is_open: bool = False
    eager: int = 0
    """How many were not compiled."""
    traced: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """How many were."""
    calls: int = 0
    """How often a weight was mixed, but for compiled code."""
    is_hidden: bool = False
    """Compiled code mixes where nobody counts: outside of the model's forward."""

    @property
    def count(self) -> int:
        return self.eager + int(self.traced)


class Site(Mark):
    """One weight that is mixed: its w_pre, and how masks are drawn for it.

    Args:
        target: the weight, with the modules that use it.
        mixout: None if the weight is only anchored.
        offload: fetches w_pre from the CPU's memory; None: w_pre lies beside the weight.
        forward: the model's forward pass.
    """

    def __init__(self, target: Target, mixout: Mixout | None, offload: Offload | None, forward: Pass) -> None:
        self.target = target
        self.mixout = mixout
        self.pretrained: Pretrained | None = None  # as long as the weight is frozen
        self.calls = 0
        self.is_traced = False
        self.hidden: torch.Tensor | None = None  # under torch.compile, while a layer runs
        self._version = target.weight._version
        self._mask_shape, self._repeats = target.mask
        self._offload = offload
        self._forward = forward
        self._seeds = SharedSeeds() if len(target.owners) > 1 else None
        self._shared: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def weight(self) -> torch.Tensor:
        """The live parameter."""
        return self.target.weight

    @property
    def values(self) -> torch.Tensor | None:
        """w_pre, dense or a DTensor; None if it has not been taken yet, or has stayed behind a pickle."""
        return self.pretrained.values if self.pretrained is not None else None

    def take(self, values: torch.Tensor, *, is_own: bool = False) -> None:
        """Make w_pre of `values`: of a copy, unless they are nobody else's."""
        self.pretrained = keep(self.name, self.weight, values, self._offload, is_own=is_own)

    def follow(self, former: "Site") -> None:
        """Go on watching a weight that was frozen when it was first patched."""
        self._version = former._version

    def ready(self, w: torch.Tensor) -> Pretrained:
        """Return w_pre; take it now if `w` was frozen until now.

        Raises:
            SourceError: it has been written to while it was frozen, and so may not be pretrained any more.
        """
        if self.pretrained is None:
            if w is not self.weight or w._version != self._version:
                raise SourceError(
                    f"{self.name}: expected a weight as it was when it was frozen, got one that has been written to "
                    "since patch_model. Call patch_model(model, w_pre=...) after unfreezing it."
                )
            self.take(w)
        assert self.pretrained is not None
        return self.pretrained

    def begin(self) -> None:
        """Start or end a forward pass of the model: uses of a tied weight before it and after it differ."""
        self._shared = None
        if self._seeds is not None:
            self._seeds.begin()

    @property
    def is_called(self) -> bool:
        """A layer that has this weight has run in training mode, so that it was mixed."""
        return self.calls > 0 or self.is_traced

    @property
    def is_torn(self) -> bool:
        """In this pass, compiled and eager code have each drawn a mask for this tied weight."""
        return self._shared is not None and self._seeds is not None and self._seeds.is_drawn

    def mixed(self, w: torch.Tensor) -> torch.Tensor:
        """Return W_mix for one call of a module, with a mask of its own or that of its tied weight."""
        assert self.mixout is not None
        is_traced = torch.compiler.is_compiling()
        rule = Rule(Chance(self.mixout.p), self.mixout.gradient == "official")
        mask = self._draw_traced(w) if is_traced else self._draw(w)
        if is_traced:
            self.is_traced = True
            if not self._forward.is_open:
                self._forward.is_hidden = True
        else:
            self.calls += 1
            self._forward.calls += 1
        return mixed_weight(w, self.ready(w), mask, rule, is_traced=is_traced)

    def _draw(self, w: torch.Tensor) -> torch.Tensor | Draw:
        assert self.mixout is not None
        chance = Chance(self.mixout.p)
        is_element = self.mixout.granularity == "element"
        if not is_element and self._seeds is None:
            return draw_mask(self._mask_shape, self._repeats, chance, w)
        seed = draw_seed() if self._seeds is None else self._seeds.seed(is_in_pass=self._forward.is_open)
        if is_element:
            return Draw(seed, tuple(w.shape), 1, chance)
        return Draw(seed, self._mask_shape, self._repeats, chance).mask(w)

    def _draw_traced(self, w: torch.Tensor) -> torch.Tensor:
        """Draw under torch.compile, which cannot follow a seed out of the graph, and recomputes in its own way."""
        assert self.mixout is not None
        if self._shared is not None:
            return self._shared
        is_element = self.mixout.granularity == "element"
        shape, repeats = (tuple(w.shape), 1) if is_element else (self._mask_shape, self._repeats)
        mask = draw_mask(shape, repeats, Chance(self.mixout.p), w)
        if self._seeds is not None and self._forward.is_open:
            self._shared = mask
        return mask

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_shared": None}


def shadow_weight(module: nn.Module, args: Any) -> None:
    """Put W_mix before the module's weight; a forward pre-hook.

    The Parameter stays where it is, in module._parameters: an attribute of the instance is found before it. torch 2.8
    cannot compile taking that away again, so there they change places; when the compiled code is left, nothing has.
    """
    reveal_weight(module, args, None)  # a KeyboardInterrupt runs no hooks: the last forward may have left its W_mix
    if not module.training:
        return
    site: Site = getattr(module, SITE)
    w = own_weight(site.name, module)
    if not w.requires_grad:
        return
    if site.is_copy:
        raise SourceError(
            f"{site.name}: expected a layer of a patched model, got one that was copied or loaded without it. "
            "Call unpatch_model or patch_model on the model that it is in now."
        )
    mixed = site.mixed(w)
    if torch.compiler.is_compiling():
        site.hidden = w
        module._parameters["weight"] = mixed  # type: ignore[assignment]
    else:
        module.__dict__["weight"] = mixed


def reveal_weight(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    """Take W_mix away again; a forward hook that is also called when forward raises."""
    if "weight" in module.__dict__ and "weight" in module._parameters:  # else it is what another tool made of it
        del module.__dict__["weight"]
    site: Site = getattr(module, SITE)
    if site.hidden is not None:
        module._parameters["weight"] = site.hidden  # type: ignore[assignment]
        site.hidden = None
