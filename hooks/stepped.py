"""The parameters that a step of a torch optimizer changes: its own, or those that DeepSpeed's ZeRO flattens for it.

ZeRO gives its optimizer one flat tensor for each group: this rank's share of all parameters of the group, in the dtype
of the master weights. It has one group stepped after the other, and copies what comes out to the parameters.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from surgery.live.foreign import is_zero3_shard
from surgery.live.zero3 import size_of

from .weights.pretrained import Pretrained, is_distributed, local

_FLAT = {
    "bit16_groups": "single_partition_of_fp32_groups",
    "bf16_groups": "fp32_groups_flat_partition",
    "fp16_groups": "fp32_partitioned_groups_flat",
}
"""Attributes of the optimizers of ZeRO 1 and 2, of ZeRO 1 in bfloat16, and of ZeRO 3: groups and their flat tensors."""


@dataclass(frozen=True, eq=False)
class Stepped:
    """A parameter that an optimizer changes.

    Args:
        w: the model's.
        group: its parameter group.
        values: what the optimizer changes: the part of `w` on this rank, or its slice of a flat tensor, maybe empty.
        grad: the gradient of the values, if there is one.
        flat: the flat tensor, None if there is none.
        start: where the slice begins in the part of `w` on this rank.
    """

    w: torch.Tensor
    group: dict[str, Any]
    values: torch.Tensor
    grad: torch.Tensor | None
    flat: torch.Tensor | None = None
    start: int = 0

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return what belongs to the values, of a tensor that is like the part of `w` on this rank."""
        if self.flat is None:
            return whole
        return whole.reshape(-1)[self.start :][: self.values.numel()].to(self.values.device, self.values.dtype)

    def w_pre(self, pretrained: Pretrained) -> torch.Tensor:
        """Return the pretrained values that belong to the values."""
        return self.slice_of(pretrained.part(self.w)) if self.values.numel() else self.values

    @property
    def is_reached(self) -> bool:
        """A backward pass has come to it, as far as is known.

        In a flat tensor it has zeros if none has; a share may have zeros anyway, as unused rows of an embedding do.
        """
        is_told = self.flat is not None and self.grad is not None and self.grad.numel() == size_of(self.w)
        return not is_told or bool(self.grad.any())  # type: ignore[union-attr]


def find_stepped(optimizer: Optimizer, *, is_closure: bool = False) -> Iterator[Stepped]:
    """Yield the parameters that an optimizer has a gradient for, amid its step.

    Args:
        is_closure: gradients come later, so that all trainable parameters count.
    """
    flats = _find_flats()
    for group in optimizer.param_groups:
        for one in group["params"]:
            if id(one) in flats:
                yield from _slices(one, group, flats[id(one)])
            elif one.grad is not None or (is_closure and one.requires_grad):
                values = local(one.detach()) if is_distributed(one) else one
                yield Stepped(one, group, values, one.grad)


def parameters_of(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Yield an optimizer's groups, each with the model's parameters in it, amid its step or load_state_dict."""
    flats = _find_flats()
    for group in optimizer.param_groups:
        yield group, [w for one in group["params"] for w in flats.get(id(one), (one,))]


def about_to_change(optimizer: Optimizer, weights: Iterable[torch.Tensor | None]) -> Iterator[Stepped]:
    """Yield those of the weights that an optimizer has a gradient for."""
    wanted = {id(w) for w in weights if w is not None and w.requires_grad}
    return (one for one in find_stepped(optimizer) if id(one.w) in wanted)


def _find_flats() -> dict[int, list[Any]]:
    """Return the parameters in each flat tensor, by its id, of the optimizer of ZeRO that has called us."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("step", "load_state_dict"):
            zero = frame.f_locals.get("self")
            for groups, flats in _FLAT.items():
                if hasattr(zero, groups) and hasattr(zero, flats):
                    return {
                        id(flat): held for flat, held in zip(getattr(zero, flats), getattr(zero, groups), strict=True)
                    }
        frame = frame.f_back
    return {}


def _slices(flat: torch.Tensor, group: dict[str, Any], held: Iterable[Any]) -> Iterator[Stepped]:
    if flat.grad is None:
        return
    end = 0
    for w in held:
        if is_zero3_shard(w):
            first, start = end, 0
            end += w.ds_tensor.ds_numel
            count = local(w).numel()
        elif w._hp_mapping is None:  # all of it is on other ranks
            first = start = count = 0
        else:
            first, count = w._hp_mapping.hp_fragment_address.start, w._hp_mapping.hp_fragment_address.numel
            start = w._hp_mapping.lp_fragment_address.start
        values, grad = (one.detach()[first : first + count] for one in (flat, flat.grad))
        yield Stepped(w, group, values, grad, flat, start)


class StepCount:
    """Counts the steps of a method; those of ZeRO's groups, one after the other, as one."""

    def __init__(self) -> None:
        self._flats: set[int] = set()

    def is_another(self, held: Iterable[Stepped]) -> bool:
        """Tell whether a step is no further group of the last one: then it has a group of that again."""
        flats = {id(one.flat) for one in held if one.flat is not None}
        is_another = not (flats and self._flats) or not flats.isdisjoint(self._flats)
        self._flats = flats if is_another else self._flats | flats
        return is_another

    def __getstate__(self) -> dict[str, Any]:
        return {"_flats": set()}
