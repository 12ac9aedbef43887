"""ChosenWeights: the parameters that were selected, each with its w_pre, their bytes and their distance from it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn

from surgery.errors import SettingError, SourceError, some
from surgery.escapes import get_logger
from surgery.live.foreign import is_zero3_shard

from ..marks import Marked, Part, put
from .distance import squares_of_difference, total
from .layers import packing
from .lora import LoraWeight
from .offload import Offload
from .pretrained import is_distributed, local, refuse_not_finite, values_of
from .selection import Scope, select
from .sources import Kept, Source, open_origin
from .target import Target
from .tracked import Tracked
from .unready import refuse_unready

_log = get_logger(__name__)


class ChosenWeights:
    """What `choose` has chosen.

    Args:
        tracked: the weights.
        lora: those that LoRA trains while they are frozen themselves.
        left: why each other parameter is not acted on, by scope and name.
        fresh: names of the parameters without a pretrained value.
        label: where w_pre comes from.
    """

    def __init__(
        self,
        tracked: Sequence[Tracked],
        lora: Sequence[LoraWeight],
        left: Mapping[Scope, Mapping[str, str]],
        fresh: set[str],
        label: str,
    ) -> None:
        self.tracked = tuple(tracked)
        self.lora = tuple(lora)
        self.left = left
        self.fresh = fresh
        self.label = label
        self._is_told = False
        # torch.compile ends a graph wherever it meets an RNN
        alone = [one for one in self.tracked if not isinstance(one.target.places[0].module, nn.RNNBase)]
        self._first = next(iter([*alone, *self.tracked]), None)

    def of(self, scope: Scope) -> tuple[Tracked, ...]:
        """Return those of a scope."""
        return tuple(one for one in self.tracked if scope == "parameters" or one.target.mask is not None)

    def attach(self) -> list[Marked]:
        """Mark the modules that hold the weights as parts of a patched model."""
        return [put(module, Part()) for module in self.owners]

    @property
    def owners(self) -> tuple[nn.Module, ...]:
        """The modules that hold the weights."""
        holders = (module for tracked in self.tracked for module in tracked.target.owners)
        return tuple(dict.fromkeys([*holders, *(one.module for one in self.lora)]))

    @property
    def device(self) -> torch.device:
        """Where one of the weights is."""
        first = self._first.weight if self._first is not None else self.lora[0].modules[0].weight
        device: torch.device = first.device  # type: ignore[assignment]
        return device

    @property
    def nbytes(self) -> int:
        """Bytes that w_pre takes on this rank."""
        kept = [tracked.pretrained for tracked in self.tracked if tracked.pretrained is not None]
        return sum(one.nbytes for one in [*kept, *(kept for one in self.lora for kept in one.kept)])

    @torch.no_grad()
    def distance(self, *, is_whole: bool = True) -> float:
        """Return ||w - w_pre||_2 over all trainable weights, in float64.

        Args:
            is_whole: False takes of sharded weights the shards of this rank, and asks no other one.
        """
        squares: list[torch.Tensor] = []
        for tracked in self.tracked:
            w = tracked.weight
            if tracked.pretrained is None or tracked.values is None or not w.requires_grad:
                continue
            part = tracked.pretrained.part(w)
            if is_distributed(w) and is_whole:
                squares.append(_square_of_shards(w, part))
            elif is_zero3_shard(w) and is_whole:
                squares.append(_square_of_shares(w, part))
            else:
                squares += squares_of_difference(local(w), part)
        lora = [one for one in self.lora if one.is_trainable and not one.is_lost]
        if not is_whole and any(is_distributed(w) for one in lora for w in one.parameters):
            return math.nan  # a shard of A is no part of B A
        return math.sqrt(total([*squares, *(one.square_of_distance() for one in lora)]))

    @property
    def is_sharded(self) -> bool:
        """Tell whether fully_shard or ZeRO-3 has split one of them over the ranks."""
        return any(is_distributed(w) or is_zero3_shard(w) for w in self._all)

    @property
    def _all(self) -> Iterator[torch.Tensor]:
        yield from (tracked.weight for tracked in self.tracked)
        yield from (module.weight for one in self.lora for module in one.modules)  # type: ignore[misc]

    def take_late(self, parameters: Sequence[torch.Tensor]) -> None:
        """Take w_pre of what was frozen until now, and may have got noise since it was patched."""
        wanted = {id(parameter) for parameter in parameters}
        for tracked in self.tracked:
            if id(tracked.weight) in wanted:
                tracked.take(values_of(tracked.weight))

    @property
    def are_all_frozen(self) -> bool:
        is_any_trainable = any(tracked.weight.requires_grad for tracked in self.tracked)
        return not is_any_trainable and not any(one.is_trainable for one in self.lora)

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
    _take_lora(selection.lora, former, offload, is_given=w_pre is not None)
    weights = {target.name: Tracked(target, offload) for target in targets}
    for tracked in kept.tracked if kept is not None else ():
        if tracked.name in weights and tracked.pretrained is None:
            weights[tracked.name].follow(tracked)
    bases = {one.name for one in selection.lora if one.is_trainable}
    wanted = [target for target in targets if target.weight.requires_grad or w_pre is not None]
    for target, values in origin.read(wanted):
        refuse_not_finite(f"w_pre: {target.name}", values)
        if target.name in bases:
            _refuse_other_base(target, values)
        else:
            weights[target.name].take(values, is_own=origin.is_own)
    return ChosenWeights(list(weights.values()), selection.lora, selection.left, origin.fresh, origin.label)


def _take_lora(
    weights: Sequence[LoraWeight], former: ChosenWeights | None, offload: Offload | None, *, is_given: bool
) -> None:
    """Keep what W0 alone does not tell of w_pre.

    Args:
        is_given: w_pre comes from elsewhere.
    """
    known = {one.module: one for one in former.lora} if former is not None else {}
    for one in weights:
        one.refuse_split()
        one.refuse_not_finite()
        if is_given and one.is_trainable and (one.moved or one.base is None or packing(one.base) is not None):
            why = "quantized" if not one.moved else f"moved for the adapter {one.moved[0]!r}"
            raise _given_for_lora(one.name, f"a base that is {why}")
        one.take_start(known.get(one.module), offload)


def _refuse_other_base(target: Target, values: torch.Tensor) -> None:
    w = target.weight.detach()
    if not torch.equal(local(w), local(values).to(w.device, w.dtype)):
        raise _given_for_lora(target.name, "other values")


def _given_for_lora(name: str, got: str) -> SourceError:
    return SourceError(
        f"w_pre: {name}: expected the frozen weight that LoRA is added to, got {got}. Leave w_pre out: LoRA's is that "
        "weight, as it computes at the start."
    )


def _refuse_split(targets: Sequence[Target], offload: Offload | None) -> None:
    split = [one.name for one in targets if is_distributed(one.weight) or is_zero3_shard(one.weight)]
    if offload is not None and split:
        raise SettingError(
            f"w_pre_device: expected same for weights that are split over the ranks, got cpu ({some(split)}). "
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


def _square_of_shares(w: Any, part: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks that ZeRO-3 has split `w` over."""
    square = torch.stack(list(squares_of_difference(local(w), part))).sum()
    torch.distributed.all_reduce(square, group=w.ds_process_group)
    return square
