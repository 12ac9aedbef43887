"""The shards of one run that several processes write, without a lock: what each is done with is a file of its own.

They lie in a folder of the output folder that only this job has. A shard takes its place by a rename, and whoever
writes it a second time writes the same bytes under another temporary name, so that two at once do no harm; and what a
process still does that was taken for lost, when the folder is finished or another job's, finds no folder any more.
"""

import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from surgery.errors import OutputError
from surgery.files import read_file
from surgery.perturb.partfile import PartFile, sync_folder

PARTS = "surgery.unfinished.parts"
"""The folder in an output folder, beside the journal."""
FINISHED, MEASURED, COMPARED = "finished", "measured", "compared"
"""Kinds of records."""
_SUFFIX = ".json"
_NO_FOLDER = (errno.ENOENT, errno.ENAMETOOLONG)  # where the journal's path is as long as there may be, there is none


class GoneError(OutputError):
    """The run is not under way any more: another command has finished the folder, or replaced it."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: expected a run that goes on, got one that another command has finished or replaced.")


class Records:
    """What is known of shards, a file for each and kind, written whole or not at all by any process.

    Args:
        folder: made by whoever begins; it is not made again when it is gone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folder."""
        for kind in (FINISHED, MEASURED, COMPARED):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, name: str, result: Any) -> None:
        """Record what is known of a shard. Raises GoneError when the folder is."""
        path = self._path(kind, name)
        with self.refusing():
            part = PartFile(path.with_suffix(f".{os.urandom(6).hex()}"))
            part.append(memoryview(json.dumps({"name": name, "result": result}).encode()))
            part.finish()
            part.path.replace(path)
            sync_folder(path.parent)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Say of a file that is not there that the folder is gone, if it is: GoneError."""
        try:
            yield
        except FileNotFoundError as error:
            if self.folder.exists():
                raise
            raise GoneError(self.folder.parent.parent) from error

    def has(self, kind: str, name: str) -> bool:
        """Tell whether a shard is recorded."""
        return self._path(kind, name).exists()

    def missing(self, kind: str, names: Collection[str]) -> list[str]:
        """Return those of some shards that are not recorded."""
        there = self._listed(kind)
        return [name for name in names if self._path(kind, name).name not in there]

    def forget(self, kind: str, name: str) -> None:
        """Drop what is recorded of a shard."""
        self._path(kind, name).unlink(missing_ok=True)

    def read(self, kind: str) -> dict[str, Any]:
        """Return the records of a kind by the shards' names; none where there is no folder."""
        found = {}
        for file in sorted(self._listed(kind)):
            with suppress(FileNotFoundError, ValueError, TypeError, KeyError):  # gone with the folder, or damaged
                entry = json.loads(read_file(self.folder / kind / file))
                found[str(entry["name"])] = entry["result"]
        return found

    def _listed(self, kind: str) -> set[str]:
        try:
            return {file for file in os.listdir(self.folder / kind) if file.endswith(_SUFFIX)}  # noqa: PTH208
        except OSError as error:
            if error.errno not in _NO_FOLDER:
                raise
            return set()

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{_digest_of_name(name)}{_SUFFIX}"


def records_of(out: Path, job: Mapping[str, Any]) -> Records:
    """Return where the records of a job are, in its output folder."""
    return Records(out / PARTS / _digest(json.dumps(job, sort_keys=True).encode()))


class SharedFolder:
    """The output folder of a run as those see it that write some of its shards.

    Args:
        path: the output folder.
        records: of the run, in that folder.
        sizes: bytes of the files to write, by name, as far as they are known.
    """

    def __init__(self, path: Path, records: Records, sizes: Mapping[str, int]) -> None:
        self.path = path
        self.records = records
        self._sizes = sizes
        self._parts: set[PartFile] = set()

    def open_part(self, name: str) -> PartFile:
        """Open a file to be written under a temporary name, and take over from whoever has begun this shard."""
        mine = _digest_of_name(name)
        for stale in self.records.folder.glob(f"{mine}.*"):
            stale.unlink(missing_ok=True)
        with self.records.refusing():
            part = PartFile(self.records.folder / f"{mine}.{os.urandom(6).hex()}", self._sizes.get(name, 0))
        self._parts.add(part)
        return part

    def finish_shard(self, name: str, part: PartFile | None, result: dict[str, Any]) -> None:
        """Put a complete shard on the disk, record it, and give it its name, unless another process has taken it over.

        In this order a shard that has its name has its record too, and is never taken for a stale one.

        Args:
            part: None where only the record is wanted.
        Raises:
            GoneError: the folder was finished or replaced meanwhile.
        """
        if part is None:
            self.records.write(FINISHED, name, result)
            return
        part.finish()
        with self.records.refusing():
            if part.path.exists() or not self.records.folder.exists():
                self.records.write(FINISHED, name, result)
                self._give_name(part, self.path / name)

    def _give_name(self, part: PartFile, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # taken over just now
            part.path.replace(path)
        sync_folder(path.parent)

    def missing(self, names: Collection[str]) -> list[str]:
        """Return those of some shards that are not recorded, or have not got their names."""
        unrecorded = {*self.records.missing(FINISHED, names)}
        return [name for name in names if name in unrecorded or not self._is_whole(name)]

    def _is_whole(self, name: str) -> bool:
        try:
            return name not in self._sizes or (self.path / name).lstat().st_size == self._sizes[name]
        except FileNotFoundError:
            return False

    def abandon(self) -> None:
        """Remove what was begun and not finished."""
        for part in self._parts:
            with suppress(OSError):
                part.path.unlink()


def _digest_of_name(name: str) -> str:
    return _digest(name.encode("utf-8", "surrogateescape"))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
