"""The folder under $XDG_CACHE_HOME in which digests of files are kept between runs, for this user's eyes alone.

Nothing in it is believed that another user could have written: the folder and each file must be this user's, and not
be writable by others.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)


def cache_root() -> Path | None:
    """Return $XDG_CACHE_HOME/model-surgery, which need not be there, or None where there is no home folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        # its specification has paths that are not absolute ignored
        return (root if root.is_absolute() else Path("~/.cache").expanduser()) / "model-surgery"
    except RuntimeError:
        return None


def cache_folder(name: str) -> Path | None:
    """Return a folder under $XDG_CACHE_HOME/model-surgery, made if need be, or None if there cannot be one."""
    try:
        if (folder := cache_root()) is None:
            return None
        folder.parent.mkdir(parents=True, exist_ok=True)
        for each in (folder, folder / name):
            with suppress(FileExistsError):
                each.mkdir(mode=0o700)
            status = each.stat()
            if not stat.S_ISDIR(status.st_mode) or not _is_own(status):
                return None
    except (OSError, ValueError):
        return None
    return folder / name


def read_cached(path: Path) -> str | None:
    """Return the text of a file that this user has written to a cache, or None."""
    try:
        fd = os.open(path, os.O_RDONLY | _NO_WAIT)
        with os.fdopen(fd, encoding="utf-8") as file:
            status = os.fstat(fd)
            return file.read() if stat.S_ISREG(status.st_mode) and _is_own(status) else None
    except (OSError, ValueError):
        return None


def write_cached(path: Path, text: str) -> None:
    """Write a file of a cache, whole or not at all; where that fails, it only costs time."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()


def _is_own(status: os.stat_result) -> bool:
    if not hasattr(os, "geteuid"):  # Windows, where modes say nothing
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & _OF_OTHERS
