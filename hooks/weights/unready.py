"""Weights whose values are not here to be copied: on the meta device, or split by DeepSpeed's ZeRO-3 or FSDP 1."""

from collections.abc import Iterable
from typing import Protocol

import torch

from surgery.errors import SourceError
from surgery.live.foreign import is_flat, is_zero3_shard

_ZERO3 = "one split by DeepSpeed's ZeRO-3", "Use ZeRO 1 or 2, or FSDP 2."


class Named(Protocol):
    """A weight and its name."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> torch.Tensor: ...


def refuse_unready(targets: Iterable[Named]) -> None:
    """Refuse weights whose values are not here to be copied.

    Raises:
        SourceError: on the meta device, or split by DeepSpeed's ZeRO-3 or FSDP 1.
    """
    for target in targets:
        weight = target.weight
        if weight.is_meta:
            fault, remedy = "one on the meta device", "Load the model without offloading, and patch it then."
        elif is_zero3_shard(weight):
            fault, remedy = _ZERO3
        elif is_flat(weight):
            fault, remedy = "one flattened by FSDP 1", "Use fully_shard, or `accelerate launch --fsdp_version 2`."
        else:
            continue
        raise _error(target.name, fault, remedy)


def refuse_sharded(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse parameters that ZeRO-3 has split, before anybody asks for their shapes, of which nothing is left."""
    for name, parameter in parameters:
        if is_zero3_shard(parameter):
            raise _error(name, *_ZERO3)


def _error(name: str, fault: str, remedy: str) -> SourceError:
    return SourceError(f"{name}: expected a weight in memory, got {fault}. {remedy}")
