"""Which compilers of kernels this Python has, found without importing them."""

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed, as it is with torch for CUDA."""
    return find_spec("triton") is not None
