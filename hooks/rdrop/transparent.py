"""Tensors that are more than they seem."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch


class Plain(torch.Tensor):
    """An ordinary tensor to whoever prints, pickles or copies it; a subclass says what a function does with it."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return cls.answer(func, args, dict(kwargs or {}))

    @staticmethod
    def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function of such tensors gives; in here, they are ordinary ones."""
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
