"""One run's lock on its output folder: flock on the folder itself, or a lock file in it where a disk has no flock."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from surgery.errors import OutputError
from surgery.files import kind_of_mode
from surgery.io_errors import naming

LOCK = ".surgery.lock"  # of a run that is under way, or was killed, on a disk without flock
_LOOK = 0.1  # seconds between two tries
_log = logging.getLogger(__name__)


@contextmanager
def lock_folder(path: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder for this run alone.

    flock's lock goes with the process that holds it, and leaves no file behind. Lustre without -o flock, some network
    file systems and some of FUSE have none: there a file holds the process and its host. What a killed process has
    left is taken over on the same host.

    Args:
        wait: seconds that another run may go on to hold it.
    Raises:
        OutputError: another run holds it.
        OSError: it cannot be opened.
    """
    with ExitStack() as stack:
        fd = os.open(path, os.O_RDONLY)
        stack.enter_context(naming(path))
        stack.callback(os.close, fd)
        try:
            is_ours = _flock(fd, wait)
        except OSError as error:  # nobody holds it
            stack.enter_context(_lock_file(path, error, wait))
        else:
            if not is_ours:
                raise _held(path, "")
        yield


def _flock(fd: int, wait: float) -> bool:
    """Take the lock; tell whether it is ours, or another's. Raises OSError where there is none."""
    from filelock import lock_descriptor  # not before there is something to lock: it takes a while to import

    until = time.monotonic() + wait
    while True:
        try:
            if lock_descriptor(fd, blocking=False):
                return True
        except InterruptedError:
            continue
        if time.monotonic() >= until:
            return False
        time.sleep(_LOOK)


def _held(path: Path, hint: str) -> OutputError:
    return OutputError(
        f"{path}: expected a folder for this run alone, got one that another run is writing to. "
        f"Wait for it, or choose another with `out`{hint}."
    )


@contextmanager
def _lock_file(path: Path, why: OSError, wait: float) -> Iterator[None]:
    from filelock import SoftFileLock, Timeout

    file = path / LOCK
    _refuse_no_file(file)
    lock = SoftFileLock(file)
    try:
        with naming(file):
            lock.acquire(timeout=wait, poll_interval=_LOOK)
    except Timeout as error:
        raise _held(path, f"; if there is none on any host, remove {file}") from error
    except OSError as error:
        _log.warning(
            "%s: its file system has no locks (%s; %s): let no other run write to it",
            *(path, why.strerror, error.strerror),
        )
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _refuse_no_file(path: Path) -> None:
    try:
        kind = kind_of_mode(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if kind:
        raise OutputError(f"{path}: expected a lock or nothing, got {kind}. Remove it.")
