"""A file written front to back with O_DIRECT where the file system has it, to spare the page cache and a copy."""

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

_BUFFER = 4 << 20
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
        # page-aligned, as direct writes must be; one is filled while the other is on its way to the disk
        self._buffer, self._spare = (np.frombuffer(mmap.mmap(-1, _BUFFER), np.uint8) for _ in range(2))
        self._filled = 0
        self._flushed = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="surgery-write")
        self._pending: Future[None] | None = None

    def append(self, data: memoryview) -> None:
        """Add bytes at the end. Raises OSError when the disk is full."""
        while data:
            taken = min(len(data), _BUFFER - self._filled)
            # numpy copies without the GIL
            np.copyto(self._buffer[self._filled : self._filled + taken], np.frombuffer(data[:taken], np.uint8))
            self._filled += taken
            data = data[taken:]
            if self._filled == _BUFFER:
                self._flush()

    def finish(self) -> int:
        """Write what is left, put the file on the disk and close it; return its size in bytes."""
        try:
            self._wait()
            self._write(self._buffer[: self._filled], self._flushed)
            os.fsync(self._fd)
            return self._flushed + self._filled
        finally:
            self.close()

    def close(self) -> None:
        """Release the file as it is. May be called twice."""
        self._writer.shutdown()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _flush(self) -> None:
        """Send the full buffer on its way, and go on with the other."""
        self._wait()
        self._pending = self._writer.submit(self._write, self._buffer, self._flushed)
        self._buffer, self._spare = self._spare, self._buffer
        self._flushed += _BUFFER
        self._filled = 0

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()

    def _write(self, buffer: np.ndarray, offset: int) -> None:
        done = 0
        while done < buffer.size:
            try:
                done += os.pwrite(self._fd, buffer.data[done:], offset + done)
            except OSError as error:
                # direct writes come in whole blocks: the last of a file is none, or the disk's are larger than ours
                if error.errno != errno.EINVAL or not self._go_through_the_cache():
                    raise

    def _go_through_the_cache(self) -> bool:
        """End direct writing; return whether there was any."""
        if not _DIRECT:
            return False
        import fcntl  # not on Windows, which has no direct writes either

        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)
