"""Base class of the tensor subclasses here: they print, pickle and copy as ordinary tensors do."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch


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
