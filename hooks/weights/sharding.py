"""w_pre under FSDP 2 and ZeRO-3: split like the weight it belongs to, also if the model was patched before that."""

from collections.abc import Iterable

import torch
from torch import nn

from surgery.live.foreign import is_zero3_shard

from .pretrained import SplitPretrained, is_distributed
from .tracked import Tracked


def is_sharded(root: nn.Module) -> bool:
    """Tell whether fully_shard has been called on the model or in it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in root.modules())


def is_zero3(root: nn.Module) -> bool:
    """Tell whether DeepSpeed's ZeRO-3 has split the model's parameters."""
    return any(map(is_zero3_shard, root.parameters()))


def shard_pretrained(weights: Iterable[Tracked]) -> None:
    """Split every w_pre that was taken before its weight was, unless it is kept in the CPU's memory.

    To be called between forward passes, when all weights are split.
    """
    for tracked in weights:
        pretrained = tracked.pretrained
        if pretrained is None or pretrained.values is None or pretrained.offload is not None:
            continue
        is_split = is_distributed(pretrained.values) or isinstance(pretrained, SplitPretrained)
        if (is_distributed(tracked.weight) or is_zero3_shard(tracked.weight)) and not is_split:
            tracked.take(pretrained.values)
