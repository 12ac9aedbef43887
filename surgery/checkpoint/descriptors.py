"""Descriptors of files that are read: opened where they are used, and only some of those not in use stay open.

A checkpoint may have more shards than a process may have open files.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.checkpoint.at_rest import Stamp, refuse_changed
from surgery.io_errors import TOO_MANY, naming

_KEPT = 8
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_lock = threading.Lock()
_idle: dict["Descriptor", None] = {}
"""Those that are open and not in use, that which was used last at the end."""


class Descriptor:
    """The descriptor of a file that stays the one it was. May be used by several threads at once.

    Args:
        stamp: of the file.
    """

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self._path = path
        self._stamp = stamp
        self._fd = -1
        self._users = 0

    @contextmanager
    def use(self) -> Iterator[int]:
        """Keep the file open meanwhile.

        Raises:
            SourceError: it was removed or replaced.
            OSError: it cannot be opened.
        """
        with _lock:
            if self._fd < 0:
                self._fd = self._open()
            _idle.pop(self, None)
            self._users += 1
        try:
            yield self._fd
        finally:
            with _lock:
                self._users -= 1
                if not self._users:
                    _idle[self] = None
                    _close_idle(_KEPT)

    def _open(self) -> int:
        try:
            fd = os.open(self._path, _FLAGS)
        except OSError as error:
            if error.errno not in TOO_MANY or not _idle:
                if isinstance(error, FileNotFoundError):
                    refuse_changed(self._path, self._stamp)
                raise
            _close_idle(0)
            fd = os.open(self._path, _FLAGS)
        try:
            with naming(self._path):
                is_same = Stamp.of_stat(os.fstat(fd)).is_same(self._stamp)
            if not is_same:
                refuse_changed(self._path, self._stamp)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def close(self) -> None:
        """Release the file, which nobody uses any more. May be called twice."""
        with _lock:
            _idle.pop(self, None)
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with naming(self._path):
                os.close(fd)


def _close_idle(kept: int) -> None:
    while len(_idle) > kept:
        oldest = next(iter(_idle))
        del _idle[oldest]
        oldest._close()
