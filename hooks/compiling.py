"""Keep torch.compile from running a graph without hooks for a model that has them, or one whose losses go unheard."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def guard_hooks() -> None:
    """Have compiled graphs check a module's hooks, and forget those that do not.

    By default torch.compile leaves these checks out, so that of two models of one class, the second one to be compiled
    runs the graph of the first: a patched one would not be mixed, in silence. The setting stays for the process.
    """
    from torch._dynamo import config  # not with surgery: it takes a second, that an optimizer takes anyway

    if getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def eagerly(function: _Function) -> _Function:
    """Have torch.compile leave a function, and all that it calls, to Python."""
    eager: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return eager


def between_graphs(function: _Function) -> _Function:
    """Have torch.compile leave a function to Python, but compile what it calls."""
    eager: _Function = torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]
    return eager


def run_uncompiled(*kinds: type[torch.Tensor]) -> None:
    """Have torch.compile leave functions of these kinds of tensors to Python."""
    from torch._dynamo import config

    known: set[type[Any]] = getattr(config, "nontraceable_tensor_subclasses", set())
    known.update(kinds)


class _CrossEntropyLoss(nn.CrossEntropyLoss):
    """Stands in for the class that torch.compile knows by sight."""


_REAL = nn.CrossEntropyLoss


def trace_cross_entropy() -> None:
    """Have torch.compile trace nn.CrossEntropyLoss as it does any module. That stays for the process.

    It takes one that is made in a forward for its function, and then asks no TorchFunctionMode. It tells the class by
    comparing it with torch.nn.CrossEntropyLoss, so that another one of that name, for just that moment, is enough.
    """
    from torch._dynamo.variables.user_defined import UserDefinedClassVariable as Variable

    if hasattr(Variable, "_call_cross_entropy_loss"):
        Variable._call_cross_entropy_loss = _call_as_any  # type: ignore[method-assign, assignment]


def _call_as_any(variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Take the way of another class through torch.compile's `call_function`, which has called this."""
    nn.CrossEntropyLoss = _CrossEntropyLoss  # type: ignore[misc]
    try:
        return variable.call_function(tx, args, kwargs)
    finally:
        nn.CrossEntropyLoss = _REAL  # type: ignore[misc]
