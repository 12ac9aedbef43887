"""torch._dynamo settings and torch.compiler.disable, so that compiled graphs run our hooks and call loss functions."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def guard_hooks() -> None:
    """Have compiled graphs guard on a module's hooks, and discard graphs that do not.

    By default torch.compile leaves these checks out, so that of two models of one class, the second one to be compiled
    runs the graph of the first, without its own hooks and without an error. The setting stays for the process.
    """
    from torch._dynamo import config  # not at import of surgery: it takes a second, and an optimizer imports it anyway

    if getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def eagerly(function: _Function) -> _Function:
    """Run a function, and all that it calls, outside of compiled graphs."""
    eager: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return eager


def between_graphs(function: _Function) -> _Function:
    """Run a function itself outside of compiled graphs, but compile the functions that it calls."""
    eager: _Function = torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]
    return eager


def is_called_compiled() -> bool:
    """Tell whether a function that runs outside of compiled graphs was called between two of them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if any(name.startswith("__resume_at_") for name in frame.f_code.co_names):
            return True
        frame = frame.f_back
    return False


def run_uncompiled(*kinds: type[torch.Tensor]) -> None:
    """Run torch functions of these tensor subclasses outside of compiled graphs."""
    from torch._dynamo import config

    known: set[type[Any]] = getattr(config, "nontraceable_tensor_subclasses", set())
    known.update(kinds)


class _CrossEntropyLoss(nn.CrossEntropyLoss):
    """Is torch.nn.CrossEntropyLoss while torch.compile looks whether it has to do with that class."""


_REAL = nn.CrossEntropyLoss


def trace_cross_entropy() -> None:
    """Have torch.compile trace nn.CrossEntropyLoss as it does any module. The change stays for the process.

    It replaces one that is constructed in a forward by the function, and then asks no TorchFunctionMode. It recognizes
    the class by comparing it with torch.nn.CrossEntropyLoss, so that another class under that name, for just that
    moment, is enough.
    """
    from torch._dynamo.variables.user_defined import UserDefinedClassVariable as Variable

    if hasattr(Variable, "_call_cross_entropy_loss"):
        Variable._call_cross_entropy_loss = _call_as_any  # type: ignore[method-assign, assignment]


def _call_as_any(variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Call `call_function` of torch.compile, which has called this, once more: now it treats the class as any other."""
    nn.CrossEntropyLoss = _CrossEntropyLoss  # type: ignore[misc]
    try:
        return variable.call_function(tx, args, kwargs)
    finally:
        nn.CrossEntropyLoss = _REAL  # type: ignore[misc]
