"""Weights whose values are not here to be copied: on the meta device, on NVMe by DeepSpeed, or flattened by FSDP 1."""

from collections.abc import Iterable
from typing import Protocol

import torch

from surgery.errors import SourceError
from surgery.live.foreign import is_flat, unreadable_share


class Named(Protocol):
    """A weight and its name."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> torch.Tensor: ...


def refuse_unready(targets: Iterable[Named]) -> None:
    """Refuse weights whose values are not here to be copied.

    Raises:
        SourceError: on the meta device, on NVMe, or flattened by FSDP 1.
    """
    for target in targets:
        weight = target.weight
        if weight.is_meta:
            fault, remedy = "one on the meta device", "Load the model without offloading, and patch it then."
        elif share := unreadable_share(weight):
            fault, remedy = share, "Keep the weights in memory as they are, or use ZeRO 1 or 2."
        elif is_flat(weight):
            fault, remedy = "one flattened by FSDP 1", "Use fully_shard, or `accelerate launch --fsdp_version 2`."
        else:
            continue
        raise SourceError(f"{target.name}: expected a weight in memory, got {fault}. {remedy}")
