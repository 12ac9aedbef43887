"""w_pre of one weight, as a tensor: frozen, in no state_dict, moved or gathered to where the weight is."""

from typing import Any

import torch

from surgery.errors import SourceError
from surgery.live.foreign import is_zero3_shard
from surgery.live.zero3 import gather_like, shape_of, share_of, split_like

from .offload import Offload


class Pretrained:
    """The pretrained values of one weight: read only, no parameter, in no state_dict and no pickle.

    Args:
        name: the weight's, for messages.
        values: a copy of its own: dense or a DTensor, frozen.
        offload: brings values from the CPU's memory where they are kept there; None: they follow the weight.
    """

    def __init__(self, name: str, values: torch.Tensor, offload: Offload | None) -> None:
        self.name = name
        self.values: torch.Tensor | None = values
        self.offload = offload

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        """Return the values, dense, on the device and in the dtype of `w`.

        Raises:
            SourceError: they were left behind by a pickle, or do not have the shape of `w`.
        """
        values = self.values
        if values is None:
            raise SourceError(
                f"{self.name}: expected w_pre, got a model from a pickle, which does not carry it. "
                "Call patch_model with w_pre, the checkpoint it was trained from, and all its settings again, or "
                "unpatch_model."
            )
        if values.shape != shape_of(w):
            raise SourceError(
                f"{self.name}: expected shape {tuple(values.shape)} as when it was patched, got {tuple(shape_of(w))}. "
                "Patch the model after resizing it; sharding by FSDP 1 cannot be mixed."
            )
        if is_distributed(values):
            return values.to(w.dtype).full_tensor()  # type: ignore[attr-defined, no-any-return]
        if values.device == w.device and values.dtype == w.dtype:
            return values
        if self.offload is not None:
            return self.offload.fetch(self, w)
        self.values = values.to(w.device, w.dtype)  # the model has moved
        return self.values

    def part(self, w: torch.Tensor) -> torch.Tensor:
        """Return the values that belong to the part of `w` on this rank: all of them, unless `w` is a DTensor."""
        if is_distributed(w) and self.values is not None and is_distributed(self.values):
            return local(self.values)
        if is_zero3_shard(w):
            return split_like(w, self(w))
        return local(distributed_like(w, self(w))) if is_distributed(w) else self(w)

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        if self.values is None:
            return 0
        return local(self.values).nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretrained":
        copied = Pretrained.__new__(Pretrained)
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__)  # nothing writes to the values, so that copies of a model share them
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": None, "offload": None}


class SplitPretrained(Pretrained):
    """Those of a weight that ZeRO-3 has split: this rank's share."""

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        """Return the values whole, which every rank must ask for."""
        return gather_like(w, self.part(w).to(w.device))

    def part(self, w: torch.Tensor) -> torch.Tensor:
        if self.values is None:
            return super().__call__(w)
        if not is_zero3_shard(w) or self.values.shape != share_of(w).shape:
            raise SourceError(
                f"{self.name}: expected a weight that ZeRO-3 has split as it had when it was patched, got another. "
                "Call patch_model with w_pre."
            )
        return self.values.to(w.dtype)


def is_distributed(tensor: torch.Tensor) -> bool:
    """Tell whether this is a DTensor, without importing torch.distributed."""
    return hasattr(type(tensor), "full_tensor")  # torch.compile knows a class by its methods, but not a tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a DTensor, or of what ZeRO-3 has split, on this rank; any other tensor as it is."""
    if is_zero3_shard(tensor):
        return share_of(tensor)
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def values_of(w: torch.Tensor) -> torch.Tensor:
    """Return what `keep` takes of a weight itself."""
    return share_of(w) if is_zero3_shard(w) else w.detach()


def distributed_like(w: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Split a tensor as the DTensor `w` is. Nothing is sent: every rank has the whole."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, w.device_mesh, w.placements, src_data_rank=None)  # type: ignore[attr-defined]


@torch.no_grad()
def keep(name: str, w: torch.Tensor, values: torch.Tensor, offload: Offload | None, *, is_own: bool) -> Pretrained:
    """Make a w_pre for the weight `w` of `values`: in its dtype, split as it is, on its device or the CPU.

    Args:
        values: of the shape of `w`, floating point.
        is_own: whether the values are nobody else's; else they are copied: a state_dict shares memory with its model.
    """
    values = values.detach()
    if is_zero3_shard(w):
        share = share_of(w)
        part = values if values.shape == share.shape else split_like(w, values)
        return SplitPretrained(name, part.to(share.device, share.dtype, copy=True), None)
    if is_distributed(w):
        split = values if is_distributed(values) else distributed_like(w, values.to(w.device))
        return Pretrained(name, split.to(w.dtype, copy=True), None)
    device = w.device if offload is None else torch.device("cpu")
    kept = values.to(device, w.dtype, copy=not is_own)
    return Pretrained(name, kept.pin_memory() if offload is not None and w.is_cuda else kept, offload)


def refuse_not_finite(what: str, values: torch.Tensor) -> None:
    """Raise if any of the values on this rank is NaN or Inf, which every later step would spread."""
    part = local(values).detach()
    if part.numel() and not torch.isfinite(torch.stack(part.aminmax())).all():
        raise SourceError(f"{what}: expected finite values, got NaN or Inf. Repair it, or name it in exclude.")
