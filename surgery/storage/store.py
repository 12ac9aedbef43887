"""A folder on an object store through its fsspec client: listed, read by ranges, and small objects written whole."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from surgery.errors import SurgeryError
from surgery.storage.failures import Kind, as_error, is_passing, missing_client
from surgery.storage.url import Url

_PAUSES = (0.5, 2.0)  # seconds; the clients themselves have tried several times by then
_TAGS = ("ETag", "etag", "generation", "VersionId", "version_id", "content_md5", "md5Hash", "xet_hash", "blob_id")
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "created")
"""What tells one content of an object from another, as the clients call it: tags for sure, times as far as they go."""
_Answer = TypeVar("_Answer")


class _ShortError(OSError):
    """Less came than was asked for: the connection was dropped."""


@dataclass(frozen=True)
class Entry:
    """An object: its size in bytes, and what the store says to tell its content from another, such as its ETag."""

    size: int
    tags: Mapping[str, str]

    @property
    def version(self) -> str | None:
        """The surest of its tags, with its name; None if there is none."""
        return next((f"{key} {self.tags[key]}" for key in (*_TAGS, *_TIMES) if key in self.tags), None)

    @property
    def is_tagged(self) -> bool:
        """Whether its version stands for its content, whenever it was written."""
        return any(key in self.tags for key in _TAGS)

    def is_same(self, other: "Entry") -> bool:
        """Tell whether two looks at an object, of which a listing may tell less, saw one content."""
        seen = [key for key in _TAGS if key in self.tags and key in other.tags] or _TIMES
        return self.size == other.size and all(self.tags.get(key) == other.tags.get(key) for key in seen)


class Store:
    """A folder on a store. May be used by several threads at once.

    Args:
        url: the folder.
        kind: what it raises: SourceError of what is read, OutputError of what is written.
    Raises:
        SettingError: the client of such stores is not installed.
    """

    def __init__(self, url: Url, kind: Kind) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        self._kind = kind
        try:
            self.fs, root = url_to_fs(str(url), use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise missing_client(url, error) from error
        except Exception as error:
            raise as_error(error, str(url), kind) from error
        self._root = root.rstrip("/")
        # a file of fsspec reads ahead by itself, though only what is asked for is wanted
        self._reading = {"cache_type": "none"} if self._has_default("cat_file") else {}

    @property
    def has_atomic_create(self) -> bool:
        """Whether the client leaves it to the store that `create` replaces nothing, or looks first and then writes."""
        return not self._has_default("pipe_file")

    def _has_default(self, method: str) -> bool:
        """Tell whether the client has fsspec's own method, which makes do with its files."""
        from fsspec import AbstractFileSystem
        from fsspec.asyn import AsyncFileSystem

        is_default = getattr(type(self.fs), method) is getattr(AbstractFileSystem, method)
        return is_default and not isinstance(self.fs, AsyncFileSystem)

    def path(self, name: str) -> str:
        """Return what the client calls an object of this folder."""
        return f"{self._root}/{name}"

    def list(self) -> dict[str, Entry]:
        """Return every object below this folder by its name, relative to it; none if there is no such folder."""

        def find() -> Mapping[str, Mapping[str, Any]]:
            self.fs.invalidate_cache()
            try:
                found: Mapping[str, Mapping[str, Any]] = self.fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return found

        found = self.ask("", find)
        names = {path.removeprefix(f"{self._root}/"): info for path, info in found.items() if path != self._root}
        return {name: _entry(info) for name, info in sorted(names.items()) if name and not name.endswith("/")}

    def entry(self, name: str) -> Entry | None:
        """Return what the store says of an object now; None if there is none."""

        def look() -> Entry | None:
            self.fs.invalidate_cache()
            try:
                info = self.fs.info(self.path(name))
            except FileNotFoundError:
                return None
            return None if info["type"] == "directory" else _entry(info)

        return self.ask(name, look)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes of an object from `start` to before `stop`."""

        def get() -> bytes:
            data: bytes = self.fs.cat_file(self.path(name), start=start, end=stop, **self._reading)
            if len(data) != stop - start:
                raise _ShortError(f"{len(data)} of {stop - start} bytes")
            return data

        return self.ask(name, get) if stop > start else b""

    def write(self, name: str, data: bytes) -> None:
        """Write a small object, whole or not at all, in place of what is there."""
        self.ask(name, lambda: self.fs.pipe_file(self.path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object if there is none; tell whether that was so."""

        def create() -> bool:
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if not _is_refused_condition(error):
                    raise
                return False
            return True

        return self.ask(name, create)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""

        def remove() -> None:
            try:
                self.fs.rm_file(self.path(name))
            except FileNotFoundError:
                return

        self.ask(name, remove)

    def ask(self, name: str, call: Callable[[], _Answer]) -> _Answer:
        """Return what a call of the client returns; try again what may pass, and put its errors in one line."""
        for pause in _PAUSES:
            try:
                return call()
            except Exception as error:
                if not is_passing(error):
                    raise self._as_error(error, name) from error
            time.sleep(pause)
        return self.ask_once(name, call)

    def ask_once(self, name: str, call: Callable[[], _Answer]) -> _Answer:
        """Return what a call returns that cannot be made twice, and put its errors in one line."""
        try:
            return call()
        except Exception as error:
            raise self._as_error(error, name) from error

    def _as_error(self, error: Exception, name: str) -> SurgeryError:
        return as_error(error, str(self.url / name if name else self.url), self._kind)


def _entry(info: Mapping[str, Any]) -> Entry:
    tags = {key: _as_text(info[key]) for key in (*_TAGS, *_TIMES) if info.get(key)}
    return Entry(int(info["size"] or 0), tags)


def _as_text(tag: Any) -> str:
    """Write a tag as one text, quoted or not, and a time as one, a datetime or not."""
    return str(tag.timestamp() if isinstance(tag, datetime) else tag).strip('"')


def _is_refused_condition(error: OSError) -> bool:
    """Tell whether a store has refused to write where an object is: S3 says 412, or 409 to the later of two at once."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") in ("PreconditionFailed", "ConditionalRequestConflict")
