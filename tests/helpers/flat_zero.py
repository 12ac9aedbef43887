"""What DeepSpeed's ZeRO 1 and 2 show of a step, on one process that plays both of two ranks, without DeepSpeed.

Of the flat tensor of a group's parameters each rank has a half, which is stepped in their place, group after group.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer


class FlatZero:
    """One rank's optimizer, with the attributes of DeepSpeedZeroOptimizer.

    Args:
        optimizer: of torch, whose groups are taken over.
        rank: 0 has the first half of each group, 1 the second one.
    """

    def __init__(self, optimizer: Optimizer, rank: int) -> None:
        self.optimizer = optimizer
        self.bit16_groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self.single_partition_of_fp32_groups: list[torch.Tensor] = []
        self._rank = rank
        for group, held in zip(optimizer.param_groups, self.bit16_groups, strict=True):
            flat = self._half(_flatten(held)).clone().requires_grad_()
            group["params"] = [flat]
            self.single_partition_of_fp32_groups.append(flat)
            self._link(held, len(flat))

    def step(self) -> None:
        groups = self.optimizer.param_groups
        for group, held, flat in zip(groups, self.bit16_groups, self.single_partition_of_fp32_groups, strict=True):
            grads = [w.grad if w.grad is not None else torch.zeros_like(w) for w in held]
            flat.grad = self._half(_flatten(grads))
            for w in held:
                w.grad = None
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            flat.grad = None
        self.optimizer.param_groups = groups

    def _half(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(2)[self._rank]

    def _link(self, held: Sequence[Any], size: int) -> None:
        """Tell each parameter where the elements are that this rank has of it, as DeepSpeed does."""
        begin, end = self._rank * size, 0
        for w in held:
            first, end = end, end + w.numel()
            start, count = max(first, begin), min(end, begin + size) - max(first, begin)
            places = {"hp_fragment_address": start - begin, "lp_fragment_address": start - first}
            addresses = {name: SimpleNamespace(start=place, numel=count) for name, place in places.items()}
            w._hp_mapping = SimpleNamespace(**addresses) if count > 0 else None


@torch.no_grad()
def gather(ranks: Sequence[FlatZero]) -> None:
    """Have every rank's parameters be what the ranks have made of their halves."""
    for zero in ranks:
        for index, held in enumerate(zero.bit16_groups):
            whole = torch.cat([rank.single_partition_of_fp32_groups[index] for rank in ranks])
            for w, values in zip(held, whole.split([w.numel() for w in held]), strict=True):
                w.copy_(values.view(w.shape))


def _flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([one.detach().reshape(-1) for one in tensors])


def split(w: Any, rank: int) -> None:
    """Leave of a parameter what DeepSpeed's ZeRO-3 leaves on one of two ranks: a share, the last one padded."""
    size = -(-w.numel() // 2)
    padded = nn.functional.pad(w.detach().reshape(-1), (0, 2 * size - w.numel()), value=torch.nan)
    w.ds_shape, w.ds_numel, w.ds_zero_partition_rank = w.shape, w.numel(), rank
    w.ds_tensor = padded.split(size)[rank].clone()
    w.ds_tensor.ds_numel = size
    w.data = torch.empty(0, dtype=w.dtype)


class FlatZero3:
    """One rank's optimizer, with the attributes of DeepSpeedZeroOptimizer_Stage3, of parameters that `split` has split.

    Args:
        optimizer: of torch, whose only group is taken over.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        (group,) = optimizer.param_groups
        self.fp16_groups: list[list[Any]] = [list(group["params"])]
        flat = torch.cat([w.ds_tensor for w in self.fp16_groups[0]])
        self.fp32_partitioned_groups_flat = [flat.requires_grad_()]
        group["params"] = [flat]

    @torch.no_grad()
    def step(self) -> None:
        (flat,) = self.fp32_partitioned_groups_flat
        flat.grad = torch.zeros_like(flat)
        self.optimizer.step()
        flat.grad = None
        shares = flat.split([w.ds_tensor.ds_numel for w in self.fp16_groups[0]])
        for w, share in zip(self.fp16_groups[0], shares, strict=True):
            w.ds_tensor.copy_(share)
