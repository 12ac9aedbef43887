"""The output folder on an object store: locked, its objects there whole or not at all, resumable by what is there.

While a run is under way the folder holds the journal, with the job, and for each shard that is complete a small object
with its record: its digest, and the size and tag that the store gave it. Indexes and other companions come after the
shards, then card and recipe; records and journal go last.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from surgery.checkpoint.layout import CARD, JOURNAL, RECIPE
from surgery.errors import OutputError
from surgery.perturb.claims import edited_card, refuse_others_files
from surgery.perturb.former_run import is_other_card, names_in, parse_json
from surgery.perturb.partfile import place_in
from surgery.recipe import Recipe
from surgery.storage.lock import LOCK, lock_store, remove_stale_lock
from surgery.storage.store import Entry, Store
from surgery.storage.upload import Upload, abort_unfinished, open_upload
from surgery.storage.url import Url

_RECORDS = "surgery.unfinished/"


class RemotePart:
    """A new object, whose bytes are handed over in their order, and sent in any."""

    def __init__(self, name: str, upload: Upload) -> None:
        self.name = name
        self.size = 0
        self._upload = upload

    def take(self, position: int, window: memoryview, nbytes: int) -> Callable[[], None]:
        """Take the next bytes out of a window of `new_window`; return the call that sends what is due."""
        assert position == self.size
        self.size += nbytes
        return self._upload.append(place_in(window, position, nbytes))

    def append(self, data: bytes | memoryview) -> None:
        """Add bytes at the end."""
        self.size += len(data)
        self._upload.append(memoryview(data))()

    def finish(self) -> None:
        """Complete the object."""
        self._upload.finish()

    def close(self) -> None:
        """Give up what is not finished. May be called twice."""
        self._upload.close()


class RemoteOutput:
    """One run's hold on its output folder on a store, as OutputFolder is on a disk. Make it with `claim`.

    Args:
        path: the folder.
        job, resume, planned, is_record: as of OutputFolder.
    Raises:
        SettingError: the store's client is not installed.
    """

    def __init__(
        self,
        path: Url,
        job: dict[str, Any],
        resume: str,
        planned: dict[str, int],
        is_record: Callable[[str, dict[str, Any]], bool],
    ) -> None:
        self.path = path
        self.finished: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self._store = Store(path, OutputError)
        self._job = json.loads(json.dumps(job))
        self._resume = resume
        self._planned = planned
        self._is_record = is_record
        self._owned: set[str] = set()
        self._parts: set[RemotePart] = set()

    # -- claiming -------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, *, overwrite: bool) -> Iterator["RemoteOutput"]:
        """Lock the folder and make it ready: new, resumed, or with a former run's objects removed.

        Leaves the journal and the finished shards behind when the body raises, and nothing half sent.

        Raises:
            OutputError: in use, not empty, unfinished by another command, not writable, or the store fails.
        """
        with lock_store(self._store):
            try:
                self._prepare(overwrite=overwrite)
                yield self
            finally:
                for part in list(self._parts):
                    with suppress(OutputError):  # a run that resumes gives it up
                        part.close()

    def _prepare(self, *, overwrite: bool) -> None:
        present = {name: entry for name, entry in self._store.list().items() if name != LOCK}
        journal = self._read_json(JOURNAL, present) or {}
        recipe = self._read_json(RECIPE, present)
        owned = set(journal.get("owned", ())) or names_in(recipe or {})
        self._owned = owned | set(self._planned) | {CARD}
        files = {name: entry for name, entry in present.items() if not name.startswith(_RECORDS)}
        refuse_others_files(
            self.path,
            present,
            present.keys() - owned - {JOURNAL, RECIPE} - (present.keys() - files.keys() if journal else set()),
            journal=journal,
            recipe=recipe,
            job=self._job,
            resume=self._resume,
            overwrite=overwrite,
        )
        if CARD in files and is_other_card(self._store.read(CARD, 0, files[CARD].size), recipe or {}):
            raise edited_card(self.path / CARD)
        if journal.get("job") == self._job:
            self.notes = journal["notes"]
            self.finished = dict(self._whole(present))
        self._write_journal()
        # the journal is there: from here on the folder counts as unfinished, so a stale object is never loaded
        kept = {JOURNAL, *(self.finished.keys() & self._planned.keys()), *map(_record_name, self.finished)}
        for name in sorted(present.keys() - kept, key=lambda name: name != RECIPE):
            self._store.remove(name)
        if journal:
            abort_unfinished(self._store)

    def _whole(self, present: dict[str, Entry]) -> Iterator[tuple[str, Any]]:
        """Yield the shards that are finished, with their records."""
        for record_name in (name for name in present if name.startswith(_RECORDS)):
            record = self._read_json(record_name, present) or {}
            name = record_name.removeprefix(_RECORDS).removesuffix(".json")
            entry = present.get(name)
            # only its record is wanted of one that is not planned
            is_there = name not in self._planned or (
                entry is not None and (entry.size, entry.version) == (record.get("size"), record.get("version"))
            )
            if is_there and self._is_record(name, record):
                yield name, record

    def _read_json(self, name: str, present: dict[str, Entry]) -> dict[str, Any] | None:
        return parse_json(self._store.read(name, 0, present[name].size)) if name in present else None

    # -- writing --------------------------------------------------------------------------------------------------

    def open_part(self, name: str) -> RemotePart:
        """Begin an object that is seen when it is finished."""
        part = RemotePart(name, open_upload(self._store, name, self._planned.get(name, 0)))
        self._parts.add(part)
        return part

    def finish_part(self, name: str, part: RemotePart) -> int:
        """Complete an object; return its size in bytes."""
        part.finish()
        self._parts.discard(part)
        return self._written(name, part.size).size

    def _written(self, name: str, size: int) -> Entry:
        """Return what the store says of an object that was written."""
        entry = self._store.entry(name)
        if entry is None or entry.size != size:
            found = f"{entry.size}" if entry else "none"
            raise OutputError(f"{self.path / name}: expected {size} bytes on the store, got {found}. Run again.")
        return entry

    def finish_shard(self, name: str, part: RemotePart | None, result: dict[str, Any]) -> None:
        """Complete a shard, and note that it is, with what the recipe needs to know about it.

        Args:
            part: None where only the record is wanted.
        """
        if part:
            self.finish_part(name, part)
        if name in self._planned:
            result = {**result, "version": self._written(name, result["size"]).version}
        self._store.write(_record_name(name), _as_json(result))
        self.finished[name] = result

    def note(self, name: str, value: Any) -> None:
        """Keep an intermediate result in the journal, for a run that resumes this one."""
        self.notes[name] = value
        self._write_journal()

    def write(self, name: str, data: bytes) -> None:
        """Write a small object, whole or not at all."""
        self._store.write(name, data)

    def finish(self, recipe: str) -> None:
        """Write the recipe, then drop records and journal: the checkpoint is complete."""
        self.write(RECIPE, recipe.encode())
        for name in self.finished:
            self._store.remove(_record_name(name))
        self._store.remove(JOURNAL)

    def _write_journal(self) -> None:
        journal = {
            "why": "This checkpoint is not finished: the command that writes it was interrupted or is still running.",
            "resume": self._resume,
            "job": self._job,
            "owned": sorted(self._owned),
            "notes": self.notes,
        }
        self.write(JOURNAL, _as_json(journal))


def _record_name(name: str) -> str:
    return f"{_RECORDS}{name}.json"


def _as_json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def find_finished(url: Url) -> tuple[Recipe, dict[str, int]] | None:
    """Return the recipe of a run that has finished in a folder, and the sizes of its objects; None if none has."""
    store = Store(url, OutputError)
    present = store.list()
    if RECIPE not in present or JOURNAL in present:
        return None
    if LOCK in present:
        remove_stale_lock(store)
    text = store.read(RECIPE, 0, present[RECIPE].size).decode(errors="replace")
    recipe = Recipe.from_json(text, what=str(url / RECIPE))
    return recipe, {name: entry.size for name, entry in present.items()}
