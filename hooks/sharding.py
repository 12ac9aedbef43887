"""w_pre under FSDP 2: split like the weight it belongs to, also if the model was patched before it was sharded."""

from collections.abc import Iterable

import torch
from torch import nn

from .mixout import Site
from .pretrained import is_distributed


def is_sharded(root: nn.Module) -> bool:
    """Tell whether fully_shard has been called on the model or in it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in root.modules())


def shard_pretrained(sites: Iterable[Site]) -> None:
    """Split every w_pre that was taken before its weight was. Between forward passes, all weights are seen split."""
    for site in sites:
        if site.values is not None and is_distributed(site.weight) and not is_distributed(site.values):
            site.take(site.values)
