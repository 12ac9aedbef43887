"""Which kernels this Python has: C or NumPy on the CPU, Triton on the GPU."""

import logging
import threading
from functools import cache
from importlib.util import find_spec
from types import ModuleType

from surgery.kernels import native, plain

_lock = threading.Lock()
_log = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed, as it is with torch for CUDA; found without importing it."""
    return find_spec("triton") is not None


def on_cpu() -> native.Native | ModuleType:
    """Return what has the CPU kernels: `native`'s, or where they cannot be had, `plain`, which is said once."""
    with _lock:
        return _on_cpu()


@cache
def _on_cpu() -> native.Native | ModuleType:
    path = native.find()
    try:
        compiled, fault = native.Native(path) if path else None, "none"
    except (OSError, AttributeError) as error:  # built for another machine, or by another version
        compiled, fault = None, str(error)
    if compiled and not native.is_exact(compiled):
        compiled, fault = None, f"{path}, of another version or built with flags that change the bits"
    if compiled:
        return compiled
    _log.warning(
        "kernels: expected a compiled library, got %s. NumPy does the same, many times slower: install a C compiler, "
        "then model-surgery again.",
        fault,
    )
    return plain
