"""Parameters that DeepSpeed's ZeRO-3 has split over the ranks: their shapes, their shares, and the whole of them.

Of each parameter a rank keeps a share in `ds_tensor`, the last one padded; the parameter itself is empty, but while a
layer runs. DeepSpeed itself is not imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from surgery.live.foreign import is_zero3_shard


def shape_of(tensor: Any) -> torch.Size:
    """Return the shape of a tensor; of one that ZeRO-3 has split, that of the whole."""
    shape: torch.Size = tensor.ds_shape if is_zero3_shard(tensor) else tensor.shape
    return shape


def size_of(tensor: torch.Tensor) -> int:
    """Return the number of its elements, likewise."""
    return shape_of(tensor).numel()


def stored_in(tensor: Any) -> torch.Tensor:
    """Return what has the elements of a tensor: the tensor itself, or the padded share of a split one."""
    stored: torch.Tensor = tensor.ds_tensor if is_zero3_shard(tensor) else tensor
    return stored


def share_of(w: Any) -> torch.Tensor:
    """Return the elements of a split parameter that lie on this rank, flat, without padding: a view."""
    start = w.ds_tensor.ds_numel * _rank(w)
    share: torch.Tensor = w.ds_tensor.detach()[: max(0, w.ds_numel - start)]
    return share


def split_like(w: Any, whole: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor that is split as the parameter `w` is."""
    return whole.detach().reshape(-1)[w.ds_tensor.ds_numel * _rank(w) :][: w.ds_tensor.ds_numel]


def gather_like(w: Any, share: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that is split as the parameter `w` is; every rank must ask for it."""
    group, size = w.ds_process_group, w.ds_tensor.ds_numel
    padded = torch.nn.functional.pad(share, (0, size - share.numel()))
    whole = padded.new_empty(torch.distributed.get_world_size(group) * size)
    torch.distributed.all_gather(list(torch.split(whole, size)), padded, group=group)
    return whole[: w.ds_numel].view(w.ds_shape)


@contextmanager
def whole(tensor: Any, *, is_written: bool = False) -> Iterator[torch.Tensor]:
    """Give all elements of a tensor for the body of a `with`; every rank must ask for those of a split parameter.

    Args:
        is_written: what the body makes of them is what is split again.
    """
    if not is_zero3_shard(tensor):
        yield tensor
        return
    values = gather_like(tensor, share_of(tensor).to(tensor.device))
    yield values
    if is_written:
        write(tensor, values)


@torch.no_grad()
def write(w: Any, values: torch.Tensor) -> None:
    """Write values to a parameter: whole ones, or this rank's share of a split one.

    The optimizer of DeepSpeed's engine is told: it has copies of its own, which it would write over them.
    """
    if not is_zero3_shard(w):
        w.copy_(values)
    else:
        share = share_of(w)
        share.copy_(values if values.shape == share.shape else split_like(w, values)[: share.numel()])
        if w.numel():  # a small one is kept whole as well
            w.copy_(gather_like(w, share))
    update_master(w)


def update_master(w: Any) -> None:
    """Have the optimizer of DeepSpeed's engine, if there is one, go on from what a parameter is now."""
    zero, mapping = getattr(w, "_z3_optimizer", None), getattr(w, "_hp_mapping", None)
    if zero is not None:
        zero.set_local_hp_param(w.ds_tensor, w)
    elif mapping is not None:
        place = mapping.lp_fragment_address
        mapping.hp_fragment.detach().copy_(w.detach().reshape(-1)[place.start :][: place.numel])


def _rank(w: Any) -> int:
    rank: int = w.ds_zero_partition_rank  # the process group may be gone, at the end of a run
    return rank
