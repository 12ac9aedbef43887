"""What other tools have made of a module or a tensor, told without importing them: FSDP 1, ZeRO-3, quantization."""

from typing import Any

import torch


def is_fsdp1(module: Any) -> bool:
    """Tell whether this is FSDP 1's wrapper, FullyShardedDataParallel."""
    return type(module).__name__ == "FullyShardedDataParallel"


def is_engine(module: Any) -> bool:
    """Tell whether this is DeepSpeed's wrapper, DeepSpeedEngine."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__)


def is_flat(tensor: Any) -> bool:
    """Tell whether FSDP 1 has flattened weights into this parameter, or made it a view of such a one."""
    return type(tensor).__name__ == "FlatParameter" or hasattr(tensor, "_is_flat_param")


def is_zero3_shard(tensor: Any) -> bool:
    """Tell whether DeepSpeed's ZeRO-3 has split this parameter."""
    return hasattr(tensor, "ds_tensor")


def unreadable_share(tensor: Any) -> str | None:
    """Return why the share of a parameter that ZeRO-3 has split cannot be read; None if it can, or is none."""
    if not is_zero3_shard(tensor):
        return None
    if getattr(tensor.ds_tensor, "final_location", None) == "nvme":
        return "one that ZeRO-3 has put on NVMe"
    return "one that ZeRO-3 has quantized" if tensor.ds_tensor.dtype != tensor.dtype else None


def packed_class(tensor: Any) -> type | None:
    """Return the class whose elements are not simply the tensor's, such as bitsandbytes' or torchao's; DTensor too."""
    data = type(tensor.data)
    if data is not torch.Tensor:
        return data
    return type(tensor) if type(tensor).__module__.startswith("bitsandbytes") else None
