"""Base class of the tensor subclasses here: they print, pickle and copy as ordinary tensors do."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.parallel.distributed import _DDPSink


class TransparentTensor(torch.Tensor):
    """Base of the tensors that R-Drop hands to the script; each subclass says what a torch function does with it."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return cls.apply_function(func, args, dict(kwargs or {}))

    @staticmethod
    def apply_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a torch function of such tensors; __torch_function__ is off in here."""
        raise NotImplementedError

    def _as_tensor(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self._as_tensor())

    def __format__(self, spec: str) -> str:
        return format(self._as_tensor(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._as_tensor().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self._as_tensor().__deepcopy__(memo)  # type: ignore[no-any-return, no-untyped-call]


def is_clone_in_ddp_sink(func: Any) -> bool:
    """Tell whether DistributedDataParallel is cloning the outputs, in an autograd.Function that changes nothing."""
    if func is not torch.Tensor.clone or torch.is_grad_enabled():
        return False
    frame = sys._getframe(1)
    for _ in range(12):
        if frame.f_code is _DDP_SINK_FORWARD:
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


_DDP_SINK_FORWARD = _DDPSink.forward.__code__
