"""A checkpoint's files on an object store: weights stay there and are read by ranges; small files come when asked for.

What else reads a checkpoint reads files, such as its configs: these are copied to a folder of this process, each when
its path is asked for.
"""

import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.checkpoint.layout import JOURNAL, Layout, WeightSet, arrange
from surgery.checkpoint.own_names import refuse_escaping
from surgery.checkpoint.shards import complete
from surgery.checkpoint.unfinished import unfinished
from surgery.errors import SourceError
from surgery.storage.store import Entry, Store
from surgery.storage.url import Url

_PIECE = 4 << 20  # bytes at once
_BESIDE = "config.json"  # says what the tensors of one file are, too


class RemoteFiles:
    """The files below a URL, as they were when they were listed. May be used by several threads at once.

    Args:
        names: those that it is made of, the first of which must be there; None: all.
    Raises:
        SettingError: the store's client is not installed.
        SourceError: nothing there, or names that lead out of it.
    """

    def __init__(self, url: Url, names: tuple[str, ...] | None = None) -> None:
        self.url = url
        self.store = Store(url, SourceError)
        if names is None:
            self.entries: Mapping[str, Entry] = self.store.list()
        else:
            self.entries = {name: entry for name in names if (entry := self.store.entry(name))}
        if not self.entries or (names and names[0] not in self.entries):
            raise SourceError(f"{url}: expected a folder or a file on the store, got nothing there. Check the URL.")
        refuse_escaping(str(url), self.entries)
        self._make_room()

    def _make_room(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="surgery-"))
        weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to read the same files."""
        return {"url": self.url, "entries": dict(self.entries)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.url, self.entries = state["url"], state["entries"]
        self.store = Store(self.url, SourceError)
        self._make_room()

    def path(self, name: str) -> Path:
        """Return where a small file is on this machine, copied if need be; nothing is there if the store has none."""
        path = self.root / name
        entry = self.entries.get(name)
        with self._lock:
            if entry and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f"{path.name}.part")
                with part.open("wb") as file:
                    for start in range(0, entry.size, _PIECE):
                        file.write(self.store.read(name, start, min(entry.size, start + _PIECE)))
                self.refuse_changed(name)
                part.rename(path)
        return path

    def refuse_changed(self, name: str) -> None:
        """Refuse an object that is not the one that was listed.

        Raises:
            SourceError: it was removed or written anew since.
        """
        now = self.store.entry(name)
        if now is None:
            raise SourceError(
                f"{self.url / name}: expected an object at rest, got one that was removed meanwhile. Run again."
            )
        if not now.is_same(self.entries[name]):
            raise SourceError(
                f"{self.url / name}: expected an object at rest, got one that changed while it was read. Run again."
            )

    @contextmanager
    def named_by_url(self) -> Iterator[None]:
        """Name the files of this machine by their URLs in errors."""
        try:
            yield
        except SourceError as error:
            raise type(error)(str(error).replace(f"{self.root}/", f"{self.url}/")) from error


def find_remote(url: Url, *, variant: str | None, suffixes: tuple[str, ...]) -> tuple[RemoteFiles, Layout]:
    """Find the checkpoint that a URL names: a folder, or one file with one of the suffixes.

    Raises:
        SettingError: the store's client is not installed.
        SourceError: not found, unsafe, incomplete, or PyTorch's own files, which cannot be read by ranges.
    """
    files = _list(url, suffixes)
    if files.url == url:
        with files.named_by_url():
            layout = _arrange(files, variant)
    else:
        suffix = PurePosixPath(url.name).suffix
        layout = Layout((WeightSet("", url.name.removesuffix(suffix), None, suffix, (url.name,)),), (), ())
    if pickle := next((weight_set for weight_set in layout.weights if weight_set.is_pickle), None):
        raise SourceError(
            f"{files.url / pickle.on_disk[0]}: expected safetensors, which can be read by ranges, got PyTorch's own "
            "format. Copy it to a disk first."
        )
    return files, layout


def _list(url: Url, suffixes: tuple[str, ...]) -> RemoteFiles:
    if url.name.endswith(suffixes):
        with suppress(SourceError):  # a folder may have such a name too
            return RemoteFiles(url.parent, (url.name, _BESIDE))
    return RemoteFiles(url)


def _arrange(files: RemoteFiles, variant: str | None) -> Layout:
    if JOURNAL in files.entries:
        raise unfinished(str(files.url))
    found = arrange(files.entries, variant=variant, what=str(files.url))
    for weight_set in found.weights:
        if weight_set.index:
            files.path(weight_set.index)
    return complete(files.root, found, names=files.entries)
