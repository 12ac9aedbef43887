"""A new file, written with O_DIRECT where the file system has it, from the buffers in which its bytes are made."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from surgery.io_errors import FULL, UNSUPPORTED, naming

PAGE = 4096
"""Bytes. Direct writes begin and end on such boundaries, in memory and in the file."""
_WINDOW = 1 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


def new_window(nbytes: int) -> memoryview:
    """Make room for bytes of a file that are to be handed to `PartFile.take`, wherever in the file they belong."""
    return memoryview(mmap.mmap(-1, nbytes + PAGE))


def place_in(window: memoryview, position: int, nbytes: int) -> memoryview:
    """Return where in a window the bytes belong that come at `position` in their file."""
    return window[position % PAGE : position % PAGE + nbytes]


class PartFile:
    """Writes a new file, whose bytes are handed over in their order and written in any.

    A checkpoint is written once and read much later: through the page cache it would cost a copy of every byte, push
    out what the machine still needs, and leave the wait for the disk to the end. The mode follows the umask.

    Args:
        size: in bytes, if it is known; room for it is taken at once.
    Raises:
        OSError: there is none.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        self._is_direct = bool(_DIRECT)
        try:
            self._fd = self._create(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without direct writes
                raise
            self._fd = self._create(0)
            self._is_direct = False
        self._size = 0
        self._rest = b""  # what was handed over since the last page boundary
        if size and self._is_direct:
            self._reserve(size)

    def _create(self, flag: int) -> int:
        """Open a new file, in place of what a killed run has left; never a link, or a FIFO that nobody reads."""
        self.path.unlink(missing_ok=True)
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | flag, 0o666)

    def _reserve(self, size: int) -> None:
        """Take room on the disk by fallocate(2), since writes into it are faster; go on where that cannot be had.

        os.posix_fallocate would write a byte into every block of a file system without it, such as NFS before 4.2.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(self._fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) and ctypes.get_errno() in FULL:
            code = ctypes.get_errno()
            self.close()
            raise OSError(code, os.strerror(code), str(self.path))

    def take(self, position: int, window: memoryview, nbytes: int) -> Callable[[], None]:
        """Take the next bytes; return the call that writes them, to be made before the window is used again.

        Args:
            position: where in the file they belong: behind all that came before.
            window: of `new_window`, with the bytes where `place_in` says; those before them are overwritten.
        """
        assert position == self._size
        start = self._size - len(self._rest)
        end = len(self._rest) + nbytes
        whole = end // PAGE * PAGE
        window[: len(self._rest)] = self._rest
        self._rest = bytes(window[whole:end])
        self._size += nbytes
        return partial(self._write, window[:whole], start)

    def append(self, data: bytes | memoryview) -> None:
        """Add bytes at the end. Raises OSError when the disk is full."""
        window = new_window(min(len(data), _WINDOW))
        for start in range(0, len(data), _WINDOW):
            piece = data[start : start + _WINDOW]
            place_in(window, self._size, len(piece))[:] = piece
            self.take(self._size, window, len(piece))()

    def finish(self) -> int:
        """Write what is left, put the file on the disk and close it; return its size in bytes."""
        try:
            if self._rest:
                self._leave_direct()
                self._write(memoryview(self._rest), self._size - len(self._rest))
            with naming(self.path):
                if os.fstat(self._fd).st_size != self._size:  # less may have come than room was taken for
                    os.ftruncate(self._fd, self._size)
            sync(self._fd, self.path)
            return self._size
        finally:
            self.close()

    def close(self) -> None:
        """Release the file as it is. May be called twice."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with naming(self.path):
                os.close(fd)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            was_direct = self._is_direct
            try:
                with naming(self.path):
                    written = os.pwrite(self._fd, data[done:], offset + done)
                    if not written:
                        raise OSError(errno.EIO, os.strerror(errno.EIO))
                    done += written
            except OSError as error:
                # the disk's blocks are larger than ours, or the last write ended amid one
                if error.errno != errno.EINVAL or not was_direct:
                    raise
                self._leave_direct()

    def _leave_direct(self) -> None:
        """Go on through the page cache."""
        if not self._is_direct:
            return
        import fcntl  # not on Windows, which has no direct writes either

        with naming(self.path):
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_DIRECT)
        self._is_direct = False


def sync(fd: int, path: Path) -> None:
    """Put a file or a folder on the disk, where its file system knows how: some do not for folders."""
    try:
        with naming(path):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync_folder(path: Path) -> None:
    """Put the names in a folder on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        sync(fd, path)
    finally:
        with naming(path):
            os.close(fd)
