"""What a run needs of where it writes: an OutputFolder on a disk, or a RemoteOutput on a store."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from surgery.checkpoint.layout import RECIPE
from surgery.perturb.output import OutputFolder, is_finished
from surgery.recipe import Recipe
from surgery.storage.url import Url


class Part(Protocol):
    """A file under way, which is also the Sink of a shard."""

    def take(self, position: int, window: memoryview, nbytes: int) -> Callable[[], None]: ...
    def append(self, data: bytes | memoryview) -> None: ...
    def close(self) -> None: ...


class Destination(Protocol):
    """See OutputFolder."""

    finished: dict[str, Any]
    notes: dict[str, Any]

    def claim(self, *, overwrite: bool) -> AbstractContextManager[object]: ...
    def open_part(self, name: str) -> Part: ...
    def finish_part(self, name: str, part: Any) -> int: ...
    def finish_shard(self, name: str, part: Any, result: dict[str, Any]) -> None: ...
    def note(self, name: str, value: Any) -> None: ...
    def write(self, name: str, data: bytes) -> None: ...
    def finish(self, recipe: str) -> None: ...


def open_destination(
    out: Path | Url,
    job: dict[str, Any],
    resume: str,
    planned: dict[str, int],
    is_record: Callable[[str, dict[str, Any]], bool],
) -> Destination:
    """Return where a run writes, which nothing is done to yet; the arguments are those of OutputFolder."""
    if isinstance(out, Url):
        from surgery.perturb.remote_output import RemoteOutput

        return RemoteOutput(out, job, resume, planned, is_record)
    return OutputFolder(out, job, resume, planned, is_record)


def read_finished(out: Path | Url, names: Collection[str]) -> tuple[Recipe, dict[str, int]] | None:
    """Return the recipe of a finished run, and the sizes of those named files that are there; None if there is none."""
    if isinstance(out, Url):
        from surgery.perturb.remote_output import find_finished

        return find_finished(out)
    if not is_finished(out):
        return None
    paths = {name: out / name for name in names}
    return Recipe.read(out / RECIPE), {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
