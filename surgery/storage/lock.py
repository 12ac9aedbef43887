"""One run's lock on a folder of a store: an object that is made only if there is none, with its owner's name and time.

Nothing on a store goes with the process that made it: what a killed run has left is taken over on the same host, where
it can be seen to have ended, and named with its age elsewhere.
"""

import hashlib
import json
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from surgery.errors import OutputError
from surgery.storage.store import Store

LOCK = ".surgery.lock.json"
_log = logging.getLogger(__name__)
_held: set[str] = set()
"""Tokens of this process."""


@contextmanager
def lock_store(store: Store) -> Iterator[None]:
    """Hold a folder for this run alone; say so where the store cannot write an object only if there is none.

    Raises:
        OutputError: another run holds it.
    """
    mine = {"token": secrets.token_hex(8), "since": time.time(), **_process()}
    _held.add(mine["token"])
    try:
        _acquire(store, mine)
        try:
            yield
        except BaseException:
            with suppress(OutputError):  # the store may be what failed, and this process is about to end
                store.remove(LOCK)
            raise
        store.remove(LOCK)
    finally:
        _held.discard(mine["token"])


def _acquire(store: Store, mine: dict[str, Any]) -> None:
    data = json.dumps(mine).encode()
    if not store.create(LOCK, data):
        owner = _read(store)
        is_mine = owner.get("token") == mine["token"]  # and the store's answer was lost
        if not is_mine and not (_has_ended(owner) and _take_over(store, owner, data)):
            raise _refusal(store, _read(store) or owner)
    if not store.has_atomic_create or store.create(LOCK, data):
        _log.warning(
            "%s: its store cannot make an object only if there is none: let no other run write to it", store.url
        )


def remove_stale_lock(store: Store) -> None:
    """Remove a lock whose owner was killed when all but that was done."""
    owner = _read(store)
    if _has_ended(owner):
        with _alone_on_this_host(store):
            if _read(store).get("token") == owner["token"]:
                store.remove(LOCK)


def _take_over(store: Store, owner: dict[str, Any], data: bytes) -> bool:
    """Put a lock in the place of one whose owner has ended; tell whether no other run of this host was faster."""
    with _alone_on_this_host(store):
        if _read(store).get("token") != owner["token"]:
            return False
        store.remove(LOCK)
        return store.create(LOCK, data)


def _alone_on_this_host(store: Store) -> AbstractContextManager[object]:
    from filelock import FileLock

    name = hashlib.blake2b(f"{os.getuid()} {store.url}".encode(), digest_size=16).hexdigest()
    return FileLock(Path(tempfile.gettempdir()) / f"surgery-{name}.lock", mode=0o600)


def _read(store: Store) -> dict[str, Any]:
    """Return what a lock says; nothing if it is gone, or none of ours."""
    entry = store.entry(LOCK)
    try:
        found = json.loads(store.read(LOCK, 0, entry.size)) if entry else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _process() -> dict[str, Any]:
    """Return what tells this process from all others of its host, also from later ones of the same number."""
    pid, user = os.getpid(), os.environ.get("USER", "")
    started, namespace = _started(pid), _namespace()
    return {"host": socket.gethostname(), "user": user, "pid": pid, "started": started, "namespace": namespace}


def _namespace() -> str | None:
    """Return which processes this one sees: a container's are others than its host's, though both have one name."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115  (it leads nowhere)
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process that runs began, in ticks since a boot, with the boot's id, as Linux knows it."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if state in "ZX" else f"{others[18]}@{boot}"
    except (OSError, IndexError):
        return None


def _has_ended(owner: dict[str, Any]) -> bool:
    """Tell whether a lock's owner is known to have ended."""
    pid, token, mine = owner.get("pid"), owner.get("token"), _process()
    is_seen = all(owner.get(key) == mine[key] for key in ("host", "namespace"))
    if not is_seen or type(pid) is not int or not isinstance(token, str) or token in _held:
        return False
    if mine["started"] is not None:
        return _started(pid) != str(owner.get("started"))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return bool(pid == mine["pid"])  # it had the number of this process before


def _refusal(store: Store, owner: dict[str, Any]) -> OutputError:
    user, host = str(owner.get("user") or ""), str(owner.get("host") or "an unknown host")
    since = owner.get("since")
    age = f" for {_as_age(time.time() - since)}" if isinstance(since, int | float) else ""
    return OutputError(
        f"{store.url}: expected a folder for this run alone, got one that {user}{'@' if user else ''}{host} (process "
        f"{owner.get('pid')}) has been writing to{age}. Wait for it, or choose another with `out`; if it has ended, "
        f"remove {store.url / LOCK}."
    )


def _as_age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
