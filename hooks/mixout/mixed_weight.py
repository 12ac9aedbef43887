"""Forward hooks that put W_mix in the place of a layer's weight while it runs, and how each mask is drawn."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.errors import SourceError
from surgery.live.zero3 import size_of

from ..marks import Mark, put
from ..regularizer import Handle
from ..weights.selection import own_weight
from ..weights.tracked import Tracked
from .masks import Chance, Draw, SharedSeeds, draw_mask, draw_seed
from .mixing import Rule, Shadow, mixed_weight
from .settings import Mixout

MIXED = "_surgery_mixed"
"""The attribute of a mixed module that holds its MixedWeight."""


@dataclass
class Passes:
    """What the mixed weights of one model share.

    Args:
        is_open: a forward pass of the model is under way.
        uses: how often a weight was mixed for a gradient, but for compiled code.
        is_hidden: compiled code mixes where nobody counts: outside of the model's forward.
    """

    is_open: bool = False
    uses: int = 0
    is_hidden: bool = False


class Shadowed(Mark):
    """Left on a module whose weight is replaced while it runs."""

    attribute = MIXED

    def __init__(self) -> None:
        self.hidden: torch.Tensor | None = None  # the weight itself, under torch.compile, meanwhile

    def release(self, module: nn.Module) -> None:
        """Take it off a module, and the W_mix that an interrupted forward has left."""
        if module.__dict__.get(MIXED) is self:
            reveal_weight(module, None, None)
        super().release(module)

    def restore(self, attributes: MutableMapping[str, Any]) -> None:
        """Leave W_mix out of a module's attributes, or of a copy of them."""
        if isinstance(attributes.get("weight"), Shadow):
            del attributes["weight"]
        super().restore(attributes)


class MixedWeight(Shadowed):
    """One weight that is mixed, and how masks are drawn for it.

    Args:
        tracked: the weight, with its w_pre.
        settings: of Mixout.
        passes: of the model.
    """

    def __init__(self, tracked: Tracked, settings: Mixout, passes: Passes) -> None:
        super().__init__()
        assert tracked.target.mask is not None
        self.tracked = tracked
        self.settings = settings
        self.is_traced = False
        self._called = [False] * len(self.owners)
        self._used = [False] * len(self.owners)
        self._mask_shape, self._repeats = tracked.target.mask
        self._passes = passes
        self._seeds = SharedSeeds() if len(self.owners) > 1 else None
        self._shared: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return self.tracked.name

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the weight."""
        return self.tracked.target.names

    @property
    def weight(self) -> torch.Tensor:
        """The live parameter."""
        return self.tracked.weight

    @property
    def is_trainable(self) -> bool:
        return self.weight.requires_grad

    @property
    def elements(self) -> int:
        """How many of the model's trainable elements are mixed in it."""
        return size_of(self.weight)

    @property
    def parameters(self) -> list[torch.Tensor | None]:
        """What an optimizer changes. It does not raise where another tool has taken it away."""
        return [self.owners[0]._parameters.get("weight")]

    def attach(self) -> list[Handle]:
        """Have the weight mixed wherever it is used."""
        handles: list[Handle] = []
        for module in self.owners:
            handles += [put(module, self), *attach_hooks(module)]
        return handles

    def reveal(self) -> None:
        """Take away the W_mix that an interrupted forward has left."""
        for module in self.owners:
            if MIXED in module.__dict__:
                reveal_weight(module, None, None)

    @property
    def owners(self) -> tuple[nn.Module, ...]:
        """The modules that have the weight."""
        return self.tracked.target.owners

    def begin(self) -> None:
        """Start or end a forward pass of the model: uses of a tied weight before it and after it differ."""
        self._shared = None
        if self._seeds is not None:
            self._seeds.begin()

    @property
    def is_called(self) -> bool:
        """A layer that has this weight has run in training mode, so that it was mixed."""
        return any(self._called) or self.is_traced

    @property
    def is_used(self) -> bool:
        """It was mixed for a gradient: calls under no_grad train nothing."""
        return any(self._used) or self.is_traced

    @property
    def uncalled(self) -> tuple[str, ...]:
        """Names of the layers that have not run in training mode, of a tied weight of which another one has."""
        return self._names_without(self._called) if any(self._called) else ()

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the layers that it was not mixed in for a gradient, of a tied weight that was in another one."""
        return self._names_without(self._used) if any(self._used) else ()

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the layers that it was mixed in for a gradient."""
        names = zip(self.tracked.target.owner_names, self._used, strict=True)
        return tuple(name for name, is_used in names if is_used)

    def _names_without(self, seen: Sequence[bool]) -> tuple[str, ...]:
        owners = zip(self.tracked.target.owner_names, self.owners, seen, strict=True)
        # T5 and BART keep their tied weight in an embedding that nothing reads
        return tuple(name for name, module, is_seen in owners if not is_seen and not isinstance(module, nn.Embedding))

    @property
    def is_torn(self) -> bool:
        """In this pass, compiled and eager code have each drawn a mask for this tied weight."""
        return self._shared is not None and self._seeds is not None and self._seeds.is_drawn

    def mixed(self, w: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """Return W_mix for one call of a module, with a mask of its own or that of its tied weight."""
        is_traced = torch.compiler.is_compiling()
        rule = Rule(Chance(self.settings.p), self.settings.gradient == "official")
        mask = self._draw_traced(w) if is_traced else self._draw(w)
        if is_traced:
            self.is_traced = True
            if len(self.owners) > 1:
                self._note_call(module, is_for_gradient=True)
            if not self._passes.is_open:
                self._passes.is_hidden = True
        else:
            self._note_call(module, is_for_gradient=torch.is_grad_enabled())
            self._passes.uses += torch.is_grad_enabled()
        return mixed_weight(w, self.tracked.ready(w), mask, rule, is_traced=is_traced)

    def _note_call(self, module: nn.Module, *, is_for_gradient: bool) -> None:
        for index, owner in enumerate(self.owners):
            if owner is module:
                self._called[index] = True
                if is_for_gradient:
                    self._used[index] = True

    def _draw(self, w: torch.Tensor) -> torch.Tensor | Draw:
        chance = Chance(self.settings.p)
        is_element = self.settings.granularity == "element"
        if not is_element and self._seeds is None:
            return draw_mask(self._mask_shape, self._repeats, chance, w)
        seed = draw_seed() if self._seeds is None else self._seeds.seed(is_in_pass=self._passes.is_open)
        if is_element:
            return Draw(seed, tuple(w.shape), 1, chance)
        return Draw(seed, self._mask_shape, self._repeats, chance).mask(w)

    def _draw_traced(self, w: torch.Tensor) -> torch.Tensor:
        """Draw under torch.compile, which cannot follow a seed out of the graph, and recomputes in its own way."""
        if self._shared is not None:
            return self._shared
        is_element = self.settings.granularity == "element"
        shape, repeats = (tuple(w.shape), 1) if is_element else (self._mask_shape, self._repeats)
        mask = draw_mask(shape, repeats, Chance(self.settings.p), w)
        if self._seeds is not None and self._passes.is_open:
            self._shared = mask
        return mask

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_shared": None}


def attach_hooks(module: nn.Module) -> tuple[Any, Any]:
    """Have a module's weight mixed whenever it runs in training mode; return the handles of the hooks."""
    # first of the forward hooks: FSDP's put the sharded weight back in theirs
    reveal = module.register_forward_hook(reveal_weight, prepend=True, always_call=True)
    return module.register_forward_pre_hook(shadow_weight), reveal


def shadow_weight(module: nn.Module, args: Any) -> None:
    """Put W_mix before the module's weight; a forward pre-hook.

    The Parameter stays where it is, in module._parameters: an attribute of the instance is found before it. torch 2.8
    cannot compile taking that away again, so there they change places; when the compiled code is left, nothing has.
    """
    reveal_weight(module, args, None)  # a KeyboardInterrupt runs no hooks: the last forward may have left its W_mix
    if not module.training:
        return
    own: MixedWeight = getattr(module, MIXED)
    w = own_weight(own.name, module)
    if not w.requires_grad:
        return
    refuse_copy(own)
    put_before(module, w, own.mixed(w, module))


def refuse_copy(own: Any) -> None:
    """Raise in a copy of a part of a patched model."""
    if own.is_copy:
        raise SourceError(
            f"{own.name}: expected a layer of a patched model, got one that was copied or loaded without it. "
            "Call unpatch_model or patch_model on the model that it is in now."
        )


def put_before(module: nn.Module, w: torch.Tensor, mixed: torch.Tensor) -> None:
    """Have a module compute with W_mix until `reveal_weight` is called."""
    own: Shadowed = getattr(module, MIXED)
    if torch.compiler.is_compiling():
        own.hidden = w
        module._parameters["weight"] = mixed  # type: ignore[assignment]
    else:
        module.__dict__["weight"] = mixed


def reveal_weight(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    """Take W_mix away again; a forward hook that is also called when forward raises."""
    if "weight" in module.__dict__ and "weight" in module._parameters:  # else it is what another tool made of it
        del module.__dict__["weight"]
    own: Shadowed = getattr(module, MIXED)
    if own.hidden is not None:
        module._parameters["weight"] = own.hidden  # type: ignore[assignment]
        own.hidden = None
