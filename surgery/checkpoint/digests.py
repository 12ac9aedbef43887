"""sha256 of files, cached by path, inode, size and times, so that ten seeds of one checkpoint hash it once.

A digest is kept under the file's identity: path, device, inode, size, and the times of its last change to the
nanosecond. A file changed within the last seconds is not remembered, since a change after it might bear the same time.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

from surgery.caches import cache_folder
from surgery.progress import bar

_SETTLED_NS = 2_000_000_000


def sha256_of(path: Path, *, at_rest: bool = False, on_bytes: Callable[[int], object] = lambda _: None) -> str:
    """Return the file's sha256, from memory if it has not changed since.

    Args:
        at_rest: the file does not change any more, however new it is, such as one of the Hub's cache.
        on_bytes: is called with the number of bytes that have been read.
    """
    stat = path.stat()
    known = recall(path)
    if known is None:
        known = _hash(path, on_bytes)
        remember(path, known, stat, at_rest=at_rest)
    else:
        on_bytes(stat.st_size)
    return known


def sha256_of_all(paths: Iterable[Path], what: str, *, at_rest: bool = False) -> dict[Path, str]:
    """Return the sha256 of every file, hashed in parallel under a progress bar with `what` on it."""
    paths, stop = list(paths), threading.Event()

    def advance(n: int) -> None:
        if stop.is_set():  # Ctrl-C: the pool waits for what it has begun
            raise CancelledError
        on_bytes(n)

    with bar(sum(path.stat().st_size for path in paths), what) as on_bytes, ThreadPoolExecutor() as pool:
        digests = pool.map(lambda path: sha256_of(path, at_rest=at_rest, on_bytes=advance), paths)
        try:
            return dict(zip(paths, digests, strict=True))
        finally:
            stop.set()


def sha256_of_list(digests: Mapping[Path, str]) -> str:
    """Return the sha256 of one file, or of several that are read as one: of their list, as sha256sum prints it."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digests[path]}  {path.name}\n" for path in digests).encode()).hexdigest()


def _hash(path: Path, on_bytes: Callable[[int], object]) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            on_bytes(n)
    return digest.hexdigest()


def recall(path: Path) -> str | None:
    """Return the sha256 of a file that has not changed since it was remembered, or None."""
    entry = _entry(path, path.stat())
    try:
        return entry.read_text() if entry else None
    except OSError:
        return None


def remember(path: Path, sha256: str, stat: os.stat_result, *, at_rest: bool = False) -> None:
    """Keep a file's sha256, unless it changed since `stat` was taken or may yet change unseen."""
    is_settled = at_rest or time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
    entry = _entry(path, stat)
    if not entry or not is_settled or _identity(path, stat) != _identity(path, path.stat()):
        return
    part = entry.with_name(f"{entry.name}.{os.getpid()}")
    try:
        part.write_text(sha256)
        part.replace(entry)
    except OSError:  # a full or read-only cache only costs time
        part.unlink(missing_ok=True)


def _identity(path: Path, stat: os.stat_result) -> str:
    parts = (path.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return "\0".join(map(str, parts))


def _entry(path: Path, stat: os.stat_result) -> Path | None:
    folder = cache_folder("digests")
    name = hashlib.blake2b(_identity(path, stat).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return folder / name if folder else None
