"""One weight that Mixout mixes: how a mask is drawn at each call of what reads it, and who has called."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.errors import SourceError
from surgery.live.zero3 import shape_of, size_of

from ..weights.target import Place
from ..weights.tracked import Tracked
from .masks import Chance, Draw, SharedSeeds, draw_mask, draw_seed
from .mixing import Rule, mixed_weight
from .settings import Mixout
from .shadowing import reveal_left


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


class MixedWeight:
    """One weight that is mixed, and how masks are drawn for it.

    Args:
        tracked: the weight, with its w_pre.
        settings: of Mixout.
        passes: of the model.
    """

    def __init__(self, tracked: Tracked, settings: Mixout, passes: Passes) -> None:
        assert tracked.target.mask is not None
        self.tracked = tracked
        self.settings = settings
        self.is_traced = False
        self._called = [False] * len(self.places)
        self._used = [False] * len(self.places)
        self._mask_shape, self._repeats = tracked.target.mask
        self._passes = passes
        self._seeds = SharedSeeds() if len(self.places) > 1 else None
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
        return [self.places[0].module._parameters.get(self.places[0].attribute)]

    def reveal(self) -> None:
        """Take away the W_mix that an interrupted forward has left."""
        reveal_left(self.owners)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the weight is."""
        return self.tracked.target.places

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
        return tuple(place.name for place, is_used in zip(self.places, self._used, strict=True) if is_used)

    def _names_without(self, seen: Sequence[bool]) -> tuple[str, ...]:
        unseen = [place for place, is_seen in zip(self.places, seen, strict=True) if not is_seen]
        # T5 and BART keep their tied weight in an embedding that nothing reads
        return tuple(place.name for place in unseen if not isinstance(place.module, nn.Embedding))

    @property
    def is_torn(self) -> bool:
        """In this pass, compiled and eager code have each drawn a mask for this tied weight."""
        return self._shared is not None and self._seeds is not None and self._seeds.is_drawn

    def mixed(self, w: torch.Tensor, place: Place) -> torch.Tensor:
        """Return W_mix for one call of what reads it, with a mask of its own or that of its tied weight."""
        if w.shape != shape_of(w):
            raise SourceError(
                f"{self.name}: expected a weight that ZeRO-3 puts together for {type(place.reader).__name__}, which "
                "reads it, got its share: it is another layer's. Name it in exclude."
            )
        is_traced = torch.compiler.is_compiling()
        rule = Rule(Chance(self.settings.p), self.settings.gradient == "official")
        mask = self._draw_traced(w) if is_traced else self._draw(w)
        if is_traced:
            self.is_traced = True
            if len(self.places) > 1:
                self._note_call(place, is_for_gradient=True)
            if not self._passes.is_open:
                self._passes.is_hidden = True
        else:
            self._note_call(place, is_for_gradient=torch.is_grad_enabled())
            self._passes.uses += torch.is_grad_enabled()
        return mixed_weight(w, self.tracked.ready(w), mask, rule, is_traced=is_traced)

    def _note_call(self, place: Place, *, is_for_gradient: bool) -> None:
        for index, one in enumerate(self.places):
            if one is place:
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
        return self.__dict__ | {"_shared": None}
