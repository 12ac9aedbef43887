"""An object that is written front to back and is there whole or not at all: by S3's multipart upload, its parts sent by
several threads at once, or by the file that the fsspec client of another store has for it.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from surgery.errors import SurgeryError
from surgery.escapes import get_logger
from surgery.storage.store import Store

_PART = 8 << 20
"""Bytes of a part: S3 takes none below 5 MB."""
_MOST_PARTS = 10_000
_log = get_logger(__name__)


class Upload(Protocol):
    """An object under way. Nothing is seen of it before `finish`; `close` without it leaves nothing behind."""

    def append(self, data: memoryview) -> Callable[[], None]:
        """Take the next bytes; return the call that sends what is due, to be made in any order and in any thread."""

    def finish(self) -> None:
        """Complete the object, all calls made."""

    def close(self) -> None:
        """Give up what is not finished. May be called twice."""


def open_upload(store: Store, name: str, size: int) -> Upload:
    """Begin an object of about `size` bytes."""
    part = max(_PART, -(-size // (_MOST_PARTS - 1)))
    return _Multipart(store, name, part) if hasattr(store.fs, "call_s3") else _ClientFile(store, name, part)


def abort_unfinished(store: Store) -> None:
    """Give up the multipart uploads that killed runs have left in a folder: S3 keeps them, and bills for them."""
    if not hasattr(store.fs, "call_s3"):
        return
    bucket, prefix, _ = store.fs.split_path(store.path(""))
    try:
        found = store.ask("", lambda: store.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix))
        for upload in found.get("Uploads", []):
            store.ask("", partial(_abort, store, bucket, upload["Key"], upload["UploadId"]))
    except SurgeryError as error:  # not all may do that
        _log.warning("what a killed run had half sent may still be there, and cost: %s", error)


def _abort(store: Store, bucket: str, key: str, id: str) -> None:
    with suppress(FileNotFoundError):  # it has ended meanwhile
        store.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=id)


class _Multipart:
    """A multipart upload of S3, or one request where all fits in a part."""

    def __init__(self, store: Store, name: str, part: int) -> None:
        self._store = store
        self._name = name
        self._bucket, self._key, _ = store.fs.split_path(store.path(name))
        self._part = part
        self._buffer = bytearray()
        self._id: str | None = None
        self._tags: dict[int, str] = {}
        self._count = 0
        self._lock = threading.Lock()

    def append(self, data: memoryview) -> Callable[[], None]:
        due = []
        while data:
            n = self._part - len(self._buffer)
            self._buffer += data[:n]
            data = data[n:]
            if len(self._buffer) == self._part:  # some of S3's likes want all parts but the last of one size
                due.append(self._take_part())
        return partial(_call_all, due)

    def _take_part(self) -> Callable[[], None]:
        whole, self._buffer = self._buffer, bytearray()
        self._count += 1
        return partial(self._send, self._count, whole)

    def _send(self, number: int, data: bytearray) -> None:
        with self._lock:
            self._id = self._id or self._call("create_multipart_upload")["UploadId"]
        sent = self._call("upload_part", PartNumber=number, UploadId=self._id, Body=data)
        self._tags[number] = sent["ETag"]

    def finish(self) -> None:
        if not self._count:
            self._store.write(self._name, bytes(self._buffer))
            return
        if self._buffer:
            self._take_part()()
        parts = [{"PartNumber": number, "ETag": self._tags[number]} for number in sorted(self._tags)]
        self._call("complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts})
        self._id = None

    def close(self) -> None:
        id, self._id = self._id, None
        if id:
            self._store.ask(self._name, partial(_abort, self._store, self._bucket, self._key, id))

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        call = partial(self._store.fs.call_s3, method, Bucket=self._bucket, Key=self._key, **arguments)
        return self._store.ask(self._name, call)


class _ClientFile:
    """A file of a store's client, which sends its blocks itself, one after the other."""

    def __init__(self, store: Store, name: str, block: int) -> None:
        self._store = store
        self._name = name
        self._is_open = True
        path = store.path(name)
        self._file = store.ask(name, lambda: store.fs.open(path, "wb", block_size=block, autocommit=False))

    def append(self, data: memoryview) -> Callable[[], None]:
        self._store.ask_once(self._name, partial(self._file.write, data))
        return _nothing

    def finish(self) -> None:
        self._store.ask_once(self._name, self._file.close)
        self._store.ask_once(self._name, getattr(self._file, "commit", _nothing))
        self._is_open = False

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        with suppress(Exception):  # what else it left is removed by the run that resumes
            self._file.discard()
        with suppress(AttributeError):  # of a BytesIO; else to be garbage would complete it
            self._file.closed = True
        with suppress(Exception):
            self._store.remove(self._name)


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _nothing() -> None:
    """Send nothing: not enough has come yet."""
