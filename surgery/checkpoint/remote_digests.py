"""Digests of objects on a store, read a few pieces ahead, and cached by URL, size and the tag that the store gives."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from surgery.caches import cache_folder, read_cached, write_cached
from surgery.checkpoint.digests import algorithm_of, is_digest, new_digest
from surgery.checkpoint.remote import RemoteFiles
from surgery.progress import bar

_PIECE = 4 << 20  # bytes
_AHEAD = 8  # pieces


def digests_of_remote(files: RemoteFiles, recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the digest of each object, by name, from memory if its tag is known, else from one read of it.

    Args:
        recorded: what to compare them with, by name; each is computed with the algorithm of that.
    """
    known = {name: recall_remote(files, name, algorithm_of(digest)) for name, digest in recorded.items()}
    with bar(sum(files.entries[name].size for name in known if not known[name]), "checking the source") as on_bytes:
        return {name: digest or _hash(files, name, algorithm_of(recorded[name]), on_bytes)
                for name, digest in known.items()}  # fmt: skip


def _hash(files: RemoteFiles, name: str, algorithm: str, on_bytes: Callable[[int], object]) -> str:
    hasher = new_digest(algorithm)
    for piece in _read_ahead(files, name):
        hasher.update(piece)
        on_bytes(len(piece))
    files.refuse_changed(name)
    remember_remote(files, name, hasher.text())
    return hasher.text()


def _read_ahead(files: RemoteFiles, name: str) -> Iterator[bytes]:
    size = files.entries[name].size
    with ThreadPoolExecutor(_AHEAD) as pool:
        under_way: deque[Future[bytes]] = deque()
        for start in range(0, size, _PIECE):
            under_way.append(pool.submit(files.store.read, name, start, min(size, start + _PIECE)))
            if len(under_way) == _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def recall_remote(files: RemoteFiles, name: str, algorithm: str) -> str | None:
    """Return the digest of an object that has the tag which it was remembered with, or None."""
    entry = _entry(files, name, algorithm)
    kept = read_cached(entry) if entry else None
    return kept if is_digest(kept) and algorithm_of(kept) == algorithm else None


def remember_remote(files: RemoteFiles, name: str, digest: str) -> None:
    """Keep the digest of an object that the store has a tag for."""
    if entry := _entry(files, name, algorithm_of(digest)):
        write_cached(entry, digest)


def _entry(files: RemoteFiles, name: str, algorithm: str) -> Path | None:
    found = files.entries[name]
    folder = cache_folder("digests") if found.is_tagged else None
    identity = f"{files.url / name}\0{found.size}\0{found.version}"
    hashed = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return folder / f"{hashed}.{algorithm}" if folder else None
