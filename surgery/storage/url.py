"""A place on an object store as fsspec names it, `s3://bucket/folder`, which holds no credentials; `file://` is a path.

What is in a URL goes into recipes, journals and messages: one with a password or a query is refused, and not repeated.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import SettingError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<path>.*)", re.DOTALL)
_BROKEN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")  # what pathlib makes of one
_LOCAL = ("file", "local")
_ALIASES = {"s3a": "s3", "gcs": "gs"}
_ADVICE = "Leave credentials to the store's own settings, such as its environment variables or its profile."


@dataclass(frozen=True)
class Url:
    """A folder or an object on a store.

    Args:
        path: what comes after `scheme://`, without a slash at its end.
    """

    scheme: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> "Url":
        return Url(self.scheme, f"{self.path}/{name}" if self.path else name)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        return Url(self.scheme, self.path.rpartition("/")[0])

    def holds(self, other: "Url") -> bool:
        """Tell whether the other is this very place, or below it."""
        return self.scheme == other.scheme and f"{other.path}/".startswith(f"{self.path}/".lstrip("/"))


def find_url(place: str | Path) -> Url | None:
    """Return the URL that a text is; None if it is a path, or anything else.

    Raises:
        SettingError: it is one with credentials, one of several stores, or one that pathlib has broken.
    """
    text = os.fspath(place)
    found = _URL.fullmatch(text) if isinstance(place, str) else None
    if isinstance(place, Path) and _BROKEN.match(text) and not place.exists() and _is_known(text.partition(":")[0]):
        raise SettingError(f"{text}: expected a URL as str, got a Path, which cannot hold one. Pass str.")
    if isinstance(place, str) and "::" in text and "://" in text:
        raise SettingError(
            f"{text.partition('::')[0]}::...: expected one place on one store, got a chain. Write the last."
        )
    if found is None or found["scheme"] in _LOCAL:
        return None
    scheme, path = found["scheme"].lower(), found["path"]
    scheme = _ALIASES.get(scheme, scheme)
    user, at, host = path.partition("/")[0].rpartition("@")
    if at and ":" in user:
        raise SettingError(f"{scheme}://...@{host}: expected a URL without a password, got one with. {_ADVICE}")
    if "?" in path:
        raise SettingError(
            f"{scheme}://{path.partition('?')[0]}: expected a URL without a query, got one with. {_ADVICE}"
        )
    if not path.strip("/"):
        raise SettingError(f"{text}: expected a place on a store, got none. Write {scheme}://PLACE.")
    return Url(scheme, path.rstrip("/"))


def as_path(place: str | Path) -> Path:
    """Return the path that a text is: itself, its `~` expanded, or what follows `file://`."""
    if isinstance(place, str) and (found := _URL.fullmatch(place)) and found["scheme"] in _LOCAL:
        place = found["path"]
    return Path(os.path.expanduser(place))  # noqa: PTH111  (Path's own fails for an unknown ~user)


def _is_known(scheme: str) -> bool:
    from fsspec.registry import known_implementations

    return scheme in known_implementations
