"""The output folder: locked, written atomically (rename, fsync), resumable through a journal.

While a run is under way the folder holds `surgery.unfinished.json`, the journal: the job, and the results of every
shard that is finished. Shards get their name when they are complete and on the disk; indexes, configs and the other
companions come after them, so no loader finds a checkpoint before that; card and recipe are last, and the journal goes.
"""

import errno
import hashlib
import json
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.checkpoint.layout import CARD, JOURNAL, RECIPE
from surgery.errors import OutputError
from surgery.files import kind_of_mode, list_files
from surgery.lock import LOCK, lock_folder
from surgery.perturb.claims import edited_card, refuse_others_files
from surgery.perturb.former_run import is_edited, names_in, read_json
from surgery.perturb.output_errors import as_output_error
from surgery.perturb.partfile import PartFile, sync_folder
from surgery.perturb.shared import FINISHED, PARTS, SharedFolder, records_of
from surgery.sizes import as_bytes
from surgery.storage.url import Url

_PART = ".surgery-part"


class OutputFolder:
    """One run's hold on its output folder. Make it with `claim`.

    Args:
        path: the folder.
        job: what the run does, as JSON; a run resumes another if their jobs are equal.
        resume: the command that finishes the run.
        planned: size in bytes of every file the run will write, by name relative to the folder, but for the recipe
            and the card.
        is_record: tells by name and record whether a finished file of a run that is resumed can be taken over.
    """

    def __init__(
        self,
        path: Path,
        job: dict[str, Any],
        resume: str,
        planned: dict[str, int],
        is_record: Callable[[str, dict[str, Any]], bool],
    ) -> None:
        self.path = path
        self.finished: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self._job = json.loads(json.dumps(job))
        self.shared = SharedFolder(path, records_of(path, self._job), planned)
        self._resume = resume
        self._planned = planned
        self._is_record = is_record
        self._owned: set[str] = set()
        self._parts: set[Path] = set()
        self._journal_lock = threading.Lock()

    # -- claiming -------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, *, overwrite: bool) -> Iterator["OutputFolder"]:
        """Lock the folder and make it ready: new, resumed, or with a former run's files removed.

        Leaves the journal and the finished shards behind when the body raises, and no part of a file.

        Raises:
            OutputError: in use, not empty, unfinished by another command, not writable, or full.
        """
        with self.lock():
            self.prepare(overwrite=overwrite)
            yield self

    @contextmanager
    def lock(self, *, wait: float = 0.0) -> Iterator[None]:
        """Lock the folder, which is made if need be; leave no part of a file behind.

        Args:
            wait: seconds that another run may go on to hold it.
        Raises:
            OutputError: in use, or not writable.
        """
        with as_output_error(self.path, self._resume):
            self.path.mkdir(parents=True, exist_ok=True)
            with lock_folder(self.path, wait=wait):
                try:
                    yield
                finally:
                    for part in self._parts:
                        with suppress(OSError):  # a run that resumes removes it
                            part.unlink()

    def peek(self) -> dict[str, Any]:
        """Return the notes of this very run that is under way or unfinished, without the lock; else none."""
        former = self._read_journal()
        return dict(former["notes"]) if former.get("job") == self._job else {}

    def join(self, *, overwrite: bool) -> None:
        """Go on with what other processes are at work on, or make the folder ready for them. Under `lock`.

        Raises:
            OutputError: as `claim`.
        """
        former = self._read_journal()
        if former.get("job") == self._job:
            self._owned, self.finished, self.notes = set(former["owned"]), former["finished"], former["notes"]
        else:
            self.prepare(overwrite=overwrite)
        self.shared.records.prepare()

    def prepare(self, *, overwrite: bool) -> None:
        """Make the folder ready. Under `lock`; raises as `claim`."""
        former = self._read_journal()
        present = {name for name in self._present() if not (former and name.startswith(f"{PARTS}/"))}
        recipe = read_json(self.path / RECIPE)
        present.difference_update(
            _part_names(JOURNAL)
        )  # of a run killed as it wrote the journal, which is now written anew
        owned = set(former.get("owned", ())) or names_in(recipe or {})
        self._owned = owned | set(self._planned) | {CARD}
        is_same = former.get("job") == self._job
        known = owned | {JOURNAL, RECIPE}
        strangers = present - known - {part for name in known for part in _part_names(name)}
        refuse_others_files(
            self.path,
            present,
            strangers,
            journal=former,
            recipe=recipe,
            job=self._job,
            resume=self._resume,
            overwrite=overwrite,
        )
        if is_edited(self.path / CARD, recipe or {}):
            raise edited_card(self.path / CARD)
        if is_same:
            self.finished, self.notes = former["finished"], former["notes"]
            self.finished = self.finished_by_now()
            for name in self.shared.records.read(FINISHED).keys() - self.finished.keys():
                self.shared.records.forget(FINISHED, name)
        doomed = present - {*(self.finished.keys() & self._planned.keys()), JOURNAL}
        self._refuse_folders({parent for name in doomed for parent in PurePosixPath(name).parents})
        self._check_space(sum((self.path / name).lstat().st_size for name in doomed))
        self._write_journal()
        # the journal is there: from here on the folder counts as unfinished, so a stale file is never loaded
        for name in sorted(doomed, key=lambda n: n != RECIPE):
            (self.path / name).unlink()
        if not is_same:
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
        for folder in sorted({parent for name in doomed for parent in PurePosixPath(name).parents}, reverse=True):
            with suppress(OSError):  # not empty
                (self.path / folder).rmdir()

    def _read_journal(self) -> dict[str, Any]:
        """Return the journal that is there, or an empty one."""
        with suppress(FileNotFoundError):
            _refuse_special(self.path / JOURNAL, (self.path / JOURNAL).lstat().st_mode)
        return read_json(self.path / JOURNAL) or {}

    def _present(self) -> set[str]:
        """Name the files that are there, without the lock; refuse what would be waited for as it is opened."""
        present = set()
        for entry in list_files(self.path):
            _refuse_special(entry.path, entry.stat(follow_symlinks=False).st_mode)
            present.add(Path(entry.path).relative_to(self.path).as_posix())
        return {name for name in present if not name.startswith(LOCK)}

    def _refuse_folders(self, removed: Collection[PurePosixPath]) -> None:
        """Refuse folders in the place of files, and names that the disk has no room for, before hours of work."""
        for name in (*self._planned, CARD, RECIPE, JOURNAL):
            try:
                is_folder = stat.S_ISDIR((self.path / name).lstat().st_mode)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if is_folder and PurePosixPath(name) not in removed:
                raise OutputError(f"{self.path / name}: expected a file or nothing, got a folder. Move it away.")

    def finished_by_now(self) -> dict[str, Any]:
        """Return the records of the shards that are there, whoever has written them."""
        found = self.finished | self.shared.records.read(FINISHED)
        return {name: record for name, record in found.items() if self._is_whole(name, record)}

    def gather(self) -> None:
        """Note in the journal what other processes have finished."""
        self.finished = self.finished_by_now()
        self._write_journal()

    def _is_whole(self, name: str, record: dict[str, Any]) -> bool:
        if name not in self._planned:  # only its record is wanted
            return self._is_record(name, record)
        path = self.path / name
        is_there = path.is_file() and not path.is_symlink()
        return is_there and self._is_record(name, record) and path.stat().st_size == record.get("size")

    def _check_space(self, reclaimed: int) -> None:
        needed = sum(nbytes for name, nbytes in self._planned.items() if name not in self.finished) - reclaimed
        try:
            total, _, free = shutil.disk_usage(self.path)
        except OSError:
            return
        if total and needed > free:  # some file systems do not tell
            raise OutputError(
                f"{self.path}: expected {as_bytes(needed)} free on this disk, got {as_bytes(free)}. "
                "Free some space, or choose another disk with `out`."
            )

    # -- writing --------------------------------------------------------------------------------------------------

    def open_part(self, name: str) -> PartFile:
        """Open a file to be written under a temporary name."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        whole, short = _part_names(name)
        try:
            return self._open_part(self.path / whole, name)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return self._open_part(self.path / short, name)

    def _open_part(self, path: Path, name: str) -> PartFile:
        self._parts.add(path)
        return PartFile(path, self._planned.get(name, 0))

    def finish_part(self, name: str, part: PartFile) -> int:
        """Put a complete part on the disk and give it its name; return its size in bytes."""
        size = part.finish()
        path = self.path / name
        part.path.replace(path)
        self._parts.discard(part.path)
        sync_folder(path.parent)
        return size

    def finish_shard(self, name: str, part: PartFile | None, result: dict[str, Any]) -> None:
        """Give a complete shard its name, and note in the journal what the recipe needs to know about it.

        Args:
            part: None where only the record is wanted.
        """
        if part:
            self.finish_part(name, part)
        with self._journal_lock:
            self.finished[name] = result
            self._write_journal()

    def note(self, name: str, value: Any) -> None:
        """Keep an intermediate result in the journal, for a run that resumes this one."""
        self.notes[name] = value
        self._write_journal()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""
        part = self.open_part(name)
        part.append(memoryview(data))
        self.finish_part(name, part)

    def finish(self, recipe: str) -> None:
        """Write the recipe, then drop the journal: the checkpoint is complete."""
        self.write(RECIPE, recipe.encode())
        shutil.rmtree(self.path / PARTS, ignore_errors=True)  # what is in it the journal has too
        (self.path / JOURNAL).unlink()
        sync_folder(self.path)

    def _write_journal(self) -> None:
        journal = {
            "why": "This checkpoint is not finished: the command that writes it was interrupted or is still running.",
            "resume": self._resume,
            "job": self._job,
            "owned": sorted(self._owned),
            "finished": self.finished,
            "notes": self.notes,
        }
        self.write(JOURNAL, (json.dumps(journal, indent=1) + "\n").encode())


def is_finished(path: Path | Url) -> bool:
    """Tell whether a run has finished in this folder."""
    if isinstance(path, Url):
        from surgery.perturb.remote_output import find_finished

        return find_finished(path) is not None
    return (path / RECIPE).is_file() and not (path / JOURNAL).exists()


def _refuse_special(path: str | Path, mode: int) -> None:
    """Refuse what would be waited for as it is opened: a FIFO, a socket, a device."""
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise OutputError(f"{path}: expected a file, got {kind_of_mode(mode)}. Remove it, or choose another `out`.")


def _part_names(name: str) -> tuple[str, str]:
    """Return the temporary names of a file: its own and more, and one that fits wherever the journal's name does."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=5).hexdigest()
    return name + _PART, digest + _PART
