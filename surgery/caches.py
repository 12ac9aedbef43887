"""The folder under $XDG_CACHE_HOME in which digests of files are kept between runs."""

import os
from pathlib import Path


def cache_root() -> Path | None:
    """Return $XDG_CACHE_HOME/model-surgery, which need not be there, or None where there is no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "model-surgery"
    except RuntimeError:
        return None


def cache_folder(name: str) -> Path | None:
    """Return a writable folder under $XDG_CACHE_HOME/model-surgery, made if need be, or None if there cannot be one."""
    if (root := cache_root()) is None:
        return None
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
