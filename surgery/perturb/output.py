"""The output folder: locked with flock, written atomically (rename, fsync), resumable through a journal.

While a run is under way the folder holds `surgery.unfinished.json`, the journal: the job, and the results of every
shard that is finished. Shards get their name when they are complete and on the disk; indexes, configs and the other
companions come after them, so no loader finds a checkpoint before that; card and recipe are last, and the journal goes.
"""

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from surgery.checkpoint.layout import CARD, JOURNAL, RECIPE
from surgery.errors import OutputError
from surgery.escapes import get_logger
from surgery.perturb.former_run import is_edited, names_in, read_json
from surgery.perturb.partfile import FULL, PartFile

_log = get_logger(__name__)
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
        self._resume = resume
        self._planned = planned
        self._is_record = is_record
        self._owned: set[str] = set()
        self._journal_lock = threading.Lock()

    # -- claiming -------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, *, overwrite: bool) -> Iterator["OutputFolder"]:
        """Lock the folder and make it ready: new, resumed, or with a former run's files removed.

        Leaves the journal and the finished shards behind when the body raises, and no part of a file.

        Raises:
            OutputError: in use, not empty, unfinished by another command, not writable, or full.
        """
        with _as_output_error(self.path, self._resume):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(lock)
            with _as_output_error(self.path, self._resume):
                self._prepare(overwrite=overwrite)
                try:
                    yield self
                finally:
                    for part in self.path.rglob(f"*{_PART}"):
                        part.unlink(missing_ok=True)
        finally:
            os.close(lock)

    def _lock(self, fd: int) -> None:
        """Lock the folder itself: the lock goes with the process that holds it, and leaves no file behind."""
        from filelock import lock_descriptor  # not before there is something to lock: it takes a while to import

        try:
            is_ours = lock_descriptor(fd, blocking=False)
        except OSError as error:  # ENOSYS, ENOLCK, EOPNOTSUPP: nobody holds it
            _log.warning(
                "%s: its file system has no locks (%s): let no other run write to it", self.path, error.strerror
            )
            return
        if not is_ours:
            raise OutputError(
                f"{self.path}: expected a folder for this run alone, got one that another run is writing to. "
                "Wait for it, or choose another with `out`."
            )

    def _prepare(self, *, overwrite: bool) -> None:
        present = {
            p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir() or p.is_symlink()
        }
        former = read_json(self.path / JOURNAL) or {}
        recipe = read_json(self.path / RECIPE)
        present.discard(JOURNAL + _PART)  # of a run killed as it wrote the journal, which is now written anew
        owned = set(former.get("owned", ())) or names_in(recipe or {})
        self._owned = owned | set(self._planned) | {CARD}
        is_same = former.get("job") == self._job
        strangers = sorted(n for n in present if n.removesuffix(_PART) not in owned | {JOURNAL, RECIPE})
        if former and not is_same and not overwrite:
            self._refuse_other_job(former)
        if strangers or (present and not former and not (recipe and overwrite)):
            found = f"{len(strangers or present)} files, such as {(strangers or sorted(present))[0]!r}"
            hint = (
                "Choose another with `out`."
                if strangers or not recipe
                else "Replace it with `overwrite`, or use `out`."
            )
            raise OutputError(f"{self.path}: expected a new or empty folder, got {found}. {hint}")
        self._refuse_edited_card(recipe or {})
        if is_same:
            self.finished = {n: r for n, r in former["finished"].items() if self._is_whole(n, r)}
            self.notes = former["notes"]
        doomed = present - {*self.finished, JOURNAL}
        self._check_space(sum((self.path / name).lstat().st_size for name in doomed))
        self._write_journal()
        # the journal is there: from here on the folder counts as unfinished, so a stale file is never loaded
        for name in sorted(doomed, key=lambda n: n != RECIPE):
            (self.path / name).unlink()
        for folder in sorted({parent for name in doomed for parent in PurePosixPath(name).parents}, reverse=True):
            with suppress(OSError):  # not empty
                (self.path / folder).rmdir()

    def _refuse_other_job(self, journal: dict[str, Any]) -> NoReturn:
        if journal.get("resume") == self._resume:
            raise OutputError(
                f"{self.path}: expected the source as it was when this run began, got one that has changed since. "
                "Start again with `overwrite`."
            )
        raise OutputError(
            f"{self.path}: expected a new or empty folder, got one that another command did not finish. "
            f"Finish it with `{journal.get('resume')}`, or replace it with `overwrite`."
        )

    def _refuse_edited_card(self, recipe: dict[str, Any]) -> None:
        """Spare a card that its owner has written in: what else is removed here can be made again."""
        card = self.path / CARD
        if is_edited(card, recipe):
            raise OutputError(
                f"{card}: expected the card that was written here, got one edited since. Move it away first."
            )

    def _is_whole(self, name: str, record: dict[str, Any]) -> bool:
        path = self.path / name
        is_there = path.is_file() and not path.is_symlink()
        return is_there and self._is_record(name, record) and path.stat().st_size == record.get("size")

    def _check_space(self, reclaimed: int) -> None:
        needed = sum(nbytes for name, nbytes in self._planned.items() if name not in self.finished) - reclaimed
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OutputError(
                f"{self.path}: expected {_gb(needed)} free on this disk, got {_gb(free)}. "
                "Free some space, or choose another disk with `out`."
            )

    # -- writing --------------------------------------------------------------------------------------------------

    def open_part(self, name: str) -> PartFile:
        """Open a file to be written under a temporary name."""
        path = self.path / (name + _PART)
        path.parent.mkdir(parents=True, exist_ok=True)
        return PartFile(path, self._planned.get(name, 0))

    def finish_part(self, name: str, part: PartFile) -> int:
        """Put a complete part on the disk and give it its name; return its size in bytes."""
        size = part.finish()
        path = self.path / name
        path.with_name(path.name + _PART).replace(path)
        _sync_folder(path.parent)
        return size

    def record(self, name: str, result: dict[str, Any]) -> None:
        """Note in the journal that `name` is finished, with what the recipe needs to know about it."""
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
        (self.path / JOURNAL).unlink()
        _sync_folder(self.path)

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


def refuse_windows(command: str) -> None:
    """Refuse to write where a folder can be neither locked nor put on the disk.

    Raises:
        OutputError: on Windows.
    """
    if sys.platform == "win32":
        raise OutputError(
            f"surgery {command}: expected Linux or macOS, got Windows, which can neither lock a folder nor sync it to "
            "the disk. Use WSL, or call perturb_model in the script instead."
        )


def is_finished(path: Path) -> bool:
    """Tell whether a run has finished in this folder."""
    return (path / RECIPE).is_file() and not (path / JOURNAL).exists()


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _as_output_error(path: Path, resume: str) -> Iterator[None]:
    """Say what went wrong with the disk in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise OutputError(
                f"{path}: expected room on the disk, got {os.strerror(error.errno)}. Finished shards are kept: "
                f"free some space and run `{resume}`."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            reason = os.strerror(error.errno)
            raise OutputError(
                f"{path}: expected a folder to write to, got {reason}. Choose another with `out`."
            ) from error
        raise


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def refuse_output(out: Path, source_root: Path) -> None:
    """Refuse an output folder that is the source, is inside it, holds it, or lies in the Hub's cache.

    Raises:
        OutputError: any of these.
    """
    from huggingface_hub import constants

    out, root = out.resolve(), source_root.resolve()
    if out == root or out.is_relative_to(root):
        raise OutputError(
            f"{out}: expected a folder outside the source, got one inside {root}. Choose another with `out`."
        )
    if root.is_relative_to(out):  # --overwrite would remove it
        raise OutputError(
            f"{out}: expected a folder outside the source, got one that holds it. Choose another with `out`."
        )
    cache = Path(constants.HF_HUB_CACHE).resolve()
    if out.is_relative_to(cache) or ("snapshots" in out.parts and any(p.startswith("models--") for p in out.parts)):
        raise OutputError(
            f"{out}: expected a folder of your own, got one in the Hub's cache. Choose another with `out`."
        )
