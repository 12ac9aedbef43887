"""ChosenWeights: the parameters that were selected, each with its w_pre, their bytes and their distance from it."""

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn

from surgery.errors import SettingError, some
from surgery.escapes import get_logger

from ..marks import Marked, Part, put
from .distance import squares_of_difference, total
from .offload import Offload
from .pretrained import is_distributed, local, refuse_not_finite
from .selection import Scope, Target, select
from .sources import Kept, Source, open_origin
from .tracked import Tracked
from .unready import refuse_unready

_log = get_logger(__name__)


class ChosenWeights:
    """What `choose` has chosen.

    Args:
        tracked: the weights.
        left: why each other parameter is not acted on, by scope and name.
        fresh: names of the parameters without a pretrained value.
        label: where w_pre comes from.
    """

    def __init__(
        self,
        tracked: Sequence[Tracked],
        left: Mapping[Scope, Mapping[str, str]],
        fresh: set[str],
        label: str,
    ) -> None:
        self.tracked = tuple(tracked)
        self.left = left
        self.fresh = fresh
        self.label = label
        self._is_told = False

    def of(self, scope: Scope) -> tuple[Tracked, ...]:
        """Return those of a scope."""
        return tuple(one for one in self.tracked if scope == "parameters" or one.target.mask is not None)

    def attach(self) -> list[Marked]:
        """Mark the modules that hold the weights as parts of a patched model."""
        owners = dict.fromkeys(module for tracked in self.tracked for module in tracked.target.owners)
        return [put(module, Part()) for module in owners]

    @property
    def nbytes(self) -> int:
        """Bytes that w_pre takes on this rank."""
        return sum(tracked.pretrained.nbytes for tracked in self.tracked if tracked.pretrained is not None)

    @torch.no_grad()
    def distance(self, *, is_whole: bool = True) -> float:
        """Return ||w - w_pre||_2 over all trainable weights, in float64.

        Args:
            is_whole: False takes of sharded weights the shards of this rank, and asks no other one.
        """
        squares: list[torch.Tensor] = []
        for tracked in self.tracked:
            w = tracked.weight.detach()
            if tracked.pretrained is None or tracked.values is None or not tracked.weight.requires_grad:
                continue
            part = tracked.pretrained.part(w)
            if is_distributed(w) and is_whole:
                squares.append(_square_of_shards(w, part))
            else:
                squares += squares_of_difference(local(w), part)
        return math.sqrt(total(squares))

    @property
    def is_sharded(self) -> bool:
        """Tell whether fully_shard has split one of them over the ranks."""
        return any(is_distributed(tracked.weight) for tracked in self.tracked)

    def take_late(self, parameters: Sequence[torch.Tensor]) -> None:
        """Take w_pre of what was frozen until now, and may have got noise since it was patched."""
        wanted = {id(parameter) for parameter in parameters}
        for tracked in self.tracked:
            if id(tracked.weight) in wanted:
                tracked.take(tracked.weight)

    @property
    def are_all_frozen(self) -> bool:
        return not any(tracked.weight.requires_grad for tracked in self.tracked)

    def warn_frozen(self) -> None:
        """Warn once where every weight has been frozen since the model was patched."""
        if self._is_told or not self.are_all_frozen or all(tracked.pretrained is None for tracked in self.tracked):
            return
        self._is_told = True
        _log.warning(
            "%s: expected a trainable weight, got %d frozen since patch_model: nothing is regularized. "
            "Unfreeze them, and add LoRA before patch_model: it freezes what it is added to.",
            self.tracked[0].name,
            len(self.tracked),
        )


def choose(
    root: nn.Module,
    scopes: AbstractSet[Scope],
    former: ChosenWeights | None,
    *,
    w_pre: Source | None,
    offload: Offload | None,
    include: Sequence[str],
    exclude: Sequence[str],
    may_wait: bool = False,
) -> ChosenWeights:
    """Choose the weights to act on and take their w_pre, without touching the model.

    Args:
        scopes: what the methods act on.
        former: what an earlier patch of the model chose, whose w_pre is kept unless another one is given.
        w_pre: where pretrained values come from; None: from `former`, or else from the model.
        offload: keeps w_pre in the CPU's memory.
        include, exclude: globs of parameters or modules.
        may_wait: all of them may be frozen.
    Raises:
        SettingError, SourceError: as patch_model.
    """
    kept = former if w_pre is None else None
    origin = Kept(kept.tracked, kept.fresh, kept.label) if kept is not None else open_origin(root, w_pre)
    selection = select(root, origin.fresh, scopes, include=include, exclude=exclude, may_wait=may_wait)
    targets = selection.targets
    refuse_unready(targets)
    _refuse_split(targets, offload)
    for target in targets:
        refuse_not_finite(target.name, target.weight)
    weights = {target.name: Tracked(target, offload) for target in targets}
    for tracked in kept.tracked if kept is not None else ():
        if tracked.name in weights and tracked.pretrained is None:
            weights[tracked.name].follow(tracked)
    wanted = [target for target in targets if target.weight.requires_grad or w_pre is not None]
    for target, values in origin.read(wanted):
        refuse_not_finite(f"w_pre: {target.name}", values)
        weights[target.name].take(values, is_own=origin.is_own)
    return ChosenWeights(list(weights.values()), selection.left, origin.fresh, origin.label)


def _refuse_split(targets: Sequence[Target], offload: Offload | None) -> None:
    split = [target.name for target in targets if is_distributed(target.weight)]
    if offload is not None and split:
        raise SettingError(
            f"w_pre_device: expected same for weights that fully_shard has split, got cpu ({some(split)}). "
            "Leave it out: w_pre is split as they are."
        )


def _square_of_shards(w: Any, part: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks that hold a part of `w`; where it is replicated, every rank has all of it."""
    from torch.distributed.tensor import DTensor

    difference = w.to_local().double() - part.double()
    whole = DTensor.from_local(
        difference, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride()
    )
    squares: Any = whole.square().sum()
    return squares.full_tensor()  # type: ignore[no-any-return]
