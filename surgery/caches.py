"""The folder under $XDG_CACHE_HOME in which digests of files are kept between runs."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """Return a writable folder under $XDG_CACHE_HOME/model-surgery, made if need be, or None if there cannot be one."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "model-surgery" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None
