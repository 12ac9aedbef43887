"""What autograd keeps of a forward pass: every storage that was made, and those that are still alive."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Census(TorchDispatchMode):
    """Remember every storage that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        read = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in read:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    def alive(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())
