"""Compiling the CPU kernels once per machine, not once per run."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit


def _cache_folder() -> Path | None:
    """Return a writable user folder for machine code of exactly these sources, or None.

    Never beside the source: site-packages may be read-only. Named by a digest of the sources, because numba notices a
    change in the file of the kernel it compiles, but not in those of the kernels which that one calls.
    """
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = base / "model-surgery" / f"kernels-{digest.hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


_FOLDER = config.CACHE_DIR or _cache_folder()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` at its first call, without the GIL, and keep the machine code on disk where that can be."""
    # numba reads this global when a function is decorated; other users of numba in the process keep their own.
    theirs, config.CACHE_DIR = config.CACHE_DIR, str(_FOLDER or "")
    try:
        return njit(nogil=True, cache=bool(_FOLDER), error_model="numpy")(function)
    finally:
        config.CACHE_DIR = theirs
