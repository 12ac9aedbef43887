"""Which kernels this Python has: C or NumPy on the CPU, Triton on the GPU."""

import threading
from functools import cache
from importlib.util import find_spec
from types import ModuleType

from surgery.escapes import get_logger
from surgery.kernels import native, plain

_lock = threading.Lock()
_log = get_logger(__name__)


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed, as it is with torch for CUDA; found without importing it."""
    return find_spec("triton") is not None


def on_cpu() -> native.Native | ModuleType:
    """Return what has the CPU kernels: `native`'s, or where they cannot be had, `plain`, which is said once."""
    with _lock:
        return _on_cpu()


def find_compiled() -> tuple[native.Native | None, str]:
    """Return the compiled kernels if they can be had and give the right bits, and else what is there instead."""
    path = native.find()
    try:
        compiled, fault = native.Native(path) if path else None, "none"
    except (OSError, AttributeError) as error:  # built for another machine, or by another version
        compiled, fault = None, str(error)
    if compiled and not native.is_exact(compiled):
        compiled, fault = None, f"{path}, of another version or built with flags that change the bits"
    return compiled, fault


@cache
def _on_cpu() -> native.Native | ModuleType:
    compiled, fault = find_compiled()
    if compiled:
        return compiled
    _log.warning(
        "kernels: expected a compiled library, got %s. NumPy does the same, many times slower: install a C compiler, "
        "then model-surgery again.",
        fault,
    )
    return plain
