"""numba.njit with a cache on disk outside of site-packages, so that kernels are compiled once per machine."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import njit

from surgery.caches import cache_folder


def _sources_digest() -> str:
    """Digest these sources: numba notices a change in the file of a kernel, but not in those it calls into."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


# never beside the source: site-packages may be read-only, or shared by machines of different kinds
_numba_config: Any = numba.config
_FOLDER = _numba_config.CACHE_DIR or cache_folder(f"kernels-{_sources_digest()}")


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` at its first call, without the GIL, and keep the machine code on disk where that can be."""
    # numba reads this global when a function is decorated; other users of numba in the process keep their own.
    theirs, _numba_config.CACHE_DIR = _numba_config.CACHE_DIR, str(_FOLDER or "")
    try:
        return njit(nogil=True, cache=bool(_FOLDER), error_model="numpy")(function)
    finally:
        _numba_config.CACHE_DIR = theirs
