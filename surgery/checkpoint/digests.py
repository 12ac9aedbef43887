"""BLAKE3 and sha256 of files, cached by path, inode, size and times, so that ten seeds of one checkpoint hash it once.

A digest is one string with its algorithm in front, "blake3:<64 hex>" or "sha256:<64 hex>": BLAKE3 where the choice is
ours, sha256 where it is the Hub's. It is kept under the algorithm and the file's identity: path, device, inode, size,
and the times of its last change to the nanosecond. A file changed within the last seconds is not remembered, since a
change after it might bear the same time.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeGuard

from surgery.caches import cache_folder, read_cached, write_cached
from surgery.io_errors import naming
from surgery.progress import bar
from surgery.threads import streaming_workers

BLAKE3 = "blake3"
SHA256 = "sha256"
_DIGEST = re.compile(rf"({BLAKE3}|{SHA256}):[0-9a-f]{{64}}")
_SETTLED_NS = 2_000_000_000


class _State(Protocol):
    """What hashlib and blake3 have in common."""

    def update(self, data: bytes | memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


class Hasher:
    """The digest of bytes that come one piece after the other. Made by `new_digest`."""

    def __init__(self, algorithm: str, state: _State) -> None:
        self._algorithm = algorithm
        self._state = state

    def update(self, data: bytes | memoryview) -> None:
        """Take in the next piece, without the GIL if it is a large one."""
        self._state.update(data)

    def text(self) -> str:
        """Return the digest of all pieces so far."""
        return f"{self._algorithm}:{self._state.hexdigest()}"


def new_digest(algorithm: str) -> Hasher:
    """Begin a digest of bytes that come one piece after the other."""
    if algorithm == SHA256:
        return Hasher(algorithm, hashlib.sha256())
    assert algorithm == BLAKE3
    from blake3 import blake3  # not before it is needed: it takes over a millisecond to import

    return Hasher(algorithm, blake3())


def digest_of_bytes(data: bytes, algorithm: str) -> str:
    """Return the digest of bytes that are in memory."""
    hasher = new_digest(algorithm)
    hasher.update(data)
    return hasher.text()


def is_digest(value: object) -> TypeGuard[str]:
    """Tell whether a value is a digest, spelled as we spell it."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def algorithm_of(digest: str) -> str:
    """Return what a digest was computed with, to compute another with the same."""
    return digest.partition(":")[0]


def hex_of(digest: str) -> str:
    """Return a digest without its algorithm."""
    return digest.partition(":")[2]


def shorten(digest: str) -> str:
    """Return a digest as messages have it: "blake3 0123456789ab..."."""
    return f"{algorithm_of(digest)} {hex_of(digest)[:12]}..."


def digest_of(path: Path, algorithm: str) -> str:
    """Return a file's digest, as `digests_of` does."""
    return digests_of(path, [algorithm])[algorithm]


def digests_of(
    path: Path,
    algorithms: Collection[str],
    *,
    at_rest: bool = False,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> dict[str, str]:
    """Return a file's digests by algorithm, from memory if it has not changed since, else all from one read of it.

    Args:
        at_rest: the file does not change any more, however new it is, such as one of the Hub's cache.
        on_bytes: is called with the number of bytes that have been read.
    """
    stat = path.stat()
    known = {algorithm: digest for algorithm in algorithms if (digest := recall(path, algorithm))}
    if unknown := set(algorithms) - known.keys():
        for digest in _hash(path, unknown, on_bytes):
            remember(path, digest, stat, at_rest=at_rest)
            known[algorithm_of(digest)] = digest
    else:
        on_bytes(stat.st_size)
    return known


def digests_of_all(
    wanted: Mapping[Path, Collection[str]], what: str, *, at_rest: bool = False
) -> dict[Path, dict[str, str]]:
    """Return the digests of every file, hashed in parallel under a progress bar with `what` on it.

    Args:
        wanted: the algorithms, by file.
    """
    stop = threading.Event()

    def advance(n: int) -> None:
        if stop.is_set():  # Ctrl-C: the pool waits for what it has begun
            raise CancelledError
        on_bytes(n)

    with (
        bar(sum(path.stat().st_size for path in wanted), what) as on_bytes,
        ThreadPoolExecutor(streaming_workers()) as pool,
    ):
        digests = pool.map(lambda path: digests_of(path, wanted[path], at_rest=at_rest, on_bytes=advance), wanted)
        try:
            return dict(zip(wanted, digests, strict=True))
        finally:
            stop.set()


def digest_of_list(digests: Mapping[Path, str]) -> str:
    """Return the digest of one file, or of several read as one: of their list, as sha256sum or b3sum prints it.

    Args:
        digests: of one algorithm.
    """
    first = next(iter(digests.values()))
    if len(digests) == 1:
        return first
    lines = "".join(f"{hex_of(digests[path])}  {path.name}\n" for path in digests)
    return digest_of_bytes(lines.encode(), algorithm_of(first))


def _hash(path: Path, algorithms: Collection[str], on_bytes: Callable[[int], object]) -> list[str]:
    hashers, buffer = [new_digest(algorithm) for algorithm in algorithms], memoryview(bytearray(1 << 20))
    with naming(path), path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            for hasher in hashers:
                hasher.update(buffer[:n])
            on_bytes(n)
    return [hasher.text() for hasher in hashers]


def recall(path: Path, algorithm: str) -> str | None:
    """Return the digest of a file that has not changed since it was remembered, or None; a damaged one is none."""
    entry = _entry(path, path.stat(), algorithm)
    kept = read_cached(entry) if entry else None
    return kept if is_digest(kept) and algorithm_of(kept) == algorithm else None


def remember(path: Path, digest: str, stat: os.stat_result, *, at_rest: bool = False) -> None:
    """Keep a file's digest, unless it changed since `stat` was taken or may yet change unseen."""
    is_settled = at_rest or time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
    entry = _entry(path, stat, algorithm_of(digest))
    if not entry or not is_settled or _identity(path, stat) != _identity(path, path.stat()):
        return
    write_cached(entry, digest)


def _identity(path: Path, stat: os.stat_result) -> str:
    parts = (path.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return "\0".join(map(str, parts))


def _entry(path: Path, stat: os.stat_result, algorithm: str) -> Path | None:
    folder = cache_folder("digests")
    name = hashlib.blake2b(_identity(path, stat).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return folder / f"{name}.{algorithm}" if folder else None
