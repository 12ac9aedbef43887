"""A file written from front to back, past the page cache where the file system allows that."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

_BUFFER = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class PartFile:
    """Appends to a new file in large aligned writes.

    A checkpoint is written once and read much later: through the page cache it would cost a copy of every byte, push
    out what the machine still needs, and leave the wait for the disk to the end. The mode follows the umask.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self._fd = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without direct writes
                raise
            self._fd = os.open(path, flags, 0o666)
        self._buffer = np.frombuffer(mmap.mmap(-1, _BUFFER), np.uint8)  # page-aligned, as direct writes must be
        self._filled = 0
        self._flushed = 0

    def append(self, data: memoryview) -> None:
        """Add bytes at the end. Raises OSError when the disk is full."""
        while data:
            taken = min(len(data), _BUFFER - self._filled)
            # numpy copies without the GIL
            np.copyto(self._buffer[self._filled : self._filled + taken], np.frombuffer(data[:taken], np.uint8))
            self._filled += taken
            data = data[taken:]
            if self._filled == _BUFFER:
                self._flush(_BUFFER)

    def finish(self) -> int:
        """Write what is left, put the file on the disk and close it; return its size in bytes."""
        size = self._flushed + self._filled
        try:
            self._go_through_the_cache()  # direct writes come in whole blocks
            self._flush(self._filled)
            os.fsync(self._fd)
        finally:
            self.close()
        return size

    def close(self) -> None:
        """Release the file as it is. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _flush(self, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            try:
                done += os.pwrite(self._fd, self._buffer.data[done:nbytes], self._flushed + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._go_through_the_cache():  # another alignment than ours
                    raise
        self._flushed += nbytes
        self._filled = 0

    def _go_through_the_cache(self) -> bool:
        """End direct writing; return whether there was any."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)
