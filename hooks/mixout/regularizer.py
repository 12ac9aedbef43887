"""Mixout on one model: attaches the hooks to its layers, sets their dropout to 0, and tells whether they were mixed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SourceError, some
from surgery.escapes import get_logger
from surgery.live.zero3 import size_of

from ..compiling import guard_hooks
from ..marks import PATCH
from ..regularizer import Handle, Settings
from ..stepped import Stepped, about_to_change
from ..steps import Activity, AuditedRegularizer
from ..weights.chosen import ChosenWeights
from ..weights.selection import ADAPTER
from .dropout import Rate, find_rates, replace_rate
from .lora import MixedLora
from .mixed_weight import MixedWeight, Passes
from .settings import Mixout
from .shadowing import attach

_log = get_logger(__name__)


class MixoutRegularizer(AuditedRegularizer):
    """Mixout on one model: the weights of layers are mixed as long as they are trainable."""

    idle = (
        "mixout: expected a forward in training mode before an optimizer's step, got none: nothing is mixed. "
        "Call model.train(): from_pretrained leaves a model in eval mode, and so does an evaluation."
    )
    is_strict = False

    def __init__(self, settings: Mixout, weights: ChosenWeights, others: Sequence[Settings]) -> None:  # noqa: ARG002
        super().__init__()
        self.settings = settings
        self.passes = Passes()
        self.mixed: list[MixedWeight | MixedLora] = [
            *(MixedWeight(tracked, settings, self.passes) for tracked in weights.of("layers")),
            *(MixedLora(lora, settings, self.passes) for lora in weights.lora),
        ]
        self.replaced: list[Rate] = []
        self.kept: list[Rate] = []
        self._left = weights.left["layers"]
        self._forwards: Any = None
        self._is_checked = False

    # -- the model ------------------------------------------------------------------------------------------------

    def attach(self, root: nn.Module) -> list[Handle]:
        """Put hooks on the layers, and set their dropout to 0."""
        self._forwards = root.__dict__[PATCH].forwards
        handles: list[Handle] = []
        if self.settings.is_mixing:
            guard_hooks()
            handles += attach([one for one in self.mixed if isinstance(one, MixedWeight)])
            for one in self.mixed:
                handles += one.attach() if isinstance(one, MixedLora) else ()
        if self.settings.replace_dropout:
            mixed = [name for one in self.mixed if one.is_trainable for name in one.names]
            factors = (name for one in self.mixed if isinstance(one, MixedLora) for name in one.lora.names)
            self.replaced, self.kept = find_rates(root, mixed, {**self._left, **dict.fromkeys(factors, ADAPTER)})
            handles += map(replace_rate, self.replaced)
        return handles

    def abort(self) -> None:
        """Do away with the W_mix that an interrupted forward has left."""
        for one in self.mixed:
            one.reveal()

    # -- the forward ----------------------------------------------------------------------------------------------

    def begin_forward(self, root: nn.Module) -> None:  # noqa: ARG002
        """Open a pass, in which the layers of a tied weight share a mask."""
        self.passes.is_open = True
        self.next_pass()

    def next_pass(self) -> None:
        """Let tied weights draw a new mask."""
        for one in self.mixed:
            one.begin()

    def end_forward(self, root: nn.Module, output: Any) -> None:
        """Close a pass; after the first one in training that came to its end, say what it did not mix."""
        self.passes.is_open = False
        torn = [] if torch.compiler.is_compiling() else [one.name for one in self.mixed if one.is_torn]
        self.next_pass()
        if torn:
            raise SourceError(
                f"{some(torn)}: expected one mask for all layers that share it, got some compiled and some not. "
                "Compile the whole model, or name the weight in exclude."
            )
        if torch.compiler.is_compiling() or output is None or self._is_checked or not self.settings.is_mixing:
            return
        # PEFT's wrapper is in training mode around a model that is not
        trained = [one for one in self.mixed if one.is_trainable and one.owners[0].training]
        if root.training and trained:
            self._is_checked = True
            self._check_calls(trained)

    def _check_calls(self, trained: Sequence[MixedWeight | MixedLora]) -> None:
        """Name the weights whose layers a whole forward has not called; refuse if that is all of them."""
        for tied in trained:
            if tied.uncalled:
                _log.warning(
                    "%s: expected a call of the layer in forward, got none: its tied weight is mixed only in other "
                    "layers.",
                    some(tied.uncalled),
                )
        silent = [one.name for one in trained if not one.is_called]
        what = f"{some(silent)}: expected a call of the layer in forward, got none"
        if len(silent) == len(trained):
            self.refuse(f"{what} of any. Patch the model whose forward calls its layers.")
        elif silent:
            _log.warning(
                "%s (%d weights): not mixed. Its layer was replaced, or something else reads the weight.",
                what,
                len(silent),
            )

    # -- optimizer steps ------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        if self.settings.is_mixing:
            super().before_step(optimizer, is_closure=is_closure)

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        if self.settings.is_mixing:
            super().after_step(optimizer, is_closure=is_closure)

    def activity(self) -> Activity:
        """Return what changes with each forward that mixes, without a wait for the GPU."""
        if self.passes.is_hidden:
            return Activity(is_known=False)
        if not self._has_mixed:
            return Activity()
        # a compiled layer may be called by a forward that is not
        eager = self._forwards.eager if any(one.is_traced for one in self.mixed) else 0
        traced = self._forwards.traced
        return Activity((self.passes.uses, eager, id(traced), traced._version))

    def held(self, optimizer: Optimizer) -> Iterator[Stepped]:
        return about_to_change(optimizer, (w for one in self.mixed for w in one.parameters))

    # -- what came of it ------------------------------------------------------------------------------------------

    @property
    def _has_mixed(self) -> bool:
        """A weight has been mixed for a gradient, whether or not the model's own forward was called for it."""
        return any(one.is_used for one in self.mixed)

    @property
    def has_acted(self) -> bool:
        return self._has_mixed or not self.settings.is_mixing

    def facts(self, root: nn.Module) -> dict[str, Any]:
        replaced = [rate.name for rate in self.replaced if getattr(rate.module, rate.attribute, None) == 0]
        return {
            "uncalled": self._uncalled(root),
            "uncalled_ties": tuple(name for one in self._mixed_in_part for name in one.unused),
            "replaced": tuple(replaced),
            "kept": tuple(rate.name for rate in self.kept),
            "unmixed": self.missed,
        }

    def _uncalled(self, root: nn.Module) -> tuple[str, ...]:
        """Name the trainable weights in the model whose layers no forward has called for a gradient, once one has."""
        if not self.settings.is_mixing or not (self._forwards.count or self._has_mixed):
            return ()
        modules = set(root.modules())
        silent = [one for one in self.mixed if one.is_trainable and not one.is_used]
        return tuple(one.name for one in silent if not modules.isdisjoint(one.owners))

    def report(self) -> dict[str, Any]:
        mixed = [one for one in self.mixed if one.is_trainable]
        if self._has_mixed:  # one of TRL's heads is never called, for instance
            mixed = [one for one in mixed if one.is_used and not one.unused]
        return {"mixed": len(mixed)}

    @property
    def _mixed_in_part(self) -> list[MixedWeight | MixedLora]:
        """The trainable tied weights that some of their layers are called with, and others not."""
        if not self.settings.is_mixing:
            return []
        return [one for one in self.mixed if one.unused and one.is_trainable]

    def remarks(self) -> list[str]:
        tied = [
            f"mixout: {some(one.unused)}: no forward in training calls this layer. Its weight is tied, and mixed only "
            f"where {some(one.used)} is called."
            for one in self._mixed_in_part
        ]
        silent = [one.name for one in self.mixed if one.is_trainable and not one.is_used]
        if not (silent and self._has_mixed):
            return tied
        why = "not mixed, for no call of the layer in training mode came."
        return [*tied, f"mixout: {some(silent)} ({len(silent)} in all): {why}"]

    def logs(self, root: nn.Module) -> dict[str, float]:
        """Return the share of the model's trainable elements that are mixed."""
        if not self.settings.is_mixing:
            return {}
        trainable = sum(size_of(parameter) for parameter in root.parameters() if parameter.requires_grad)
        return {"mixed_share": sum(one.elements for one in self.mixed if one.is_trainable) / trainable}
