"""Read files and list folders so that each error names its file, nothing is left out, and no FIFO is waited for."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from surgery.io_errors import naming

_OF_THE_DISK = "lost+found"  # at the root of a volume, for root alone to read
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


@contextmanager
def open_file(path: Path, buffering: int = -1) -> Iterator[BinaryIO]:
    """Open a file to read; what the system says of it within the body names it."""
    with naming(path), path.open("rb", buffering) as file:
        yield file


def read_file(path: Path) -> bytes:
    """Return the bytes of a file, or raise an OSError that names it."""
    with open_file(path) as file:
        return file.read()


def kind_of_mode(mode: int) -> str | None:
    """Say what an entry of a folder is, by its st_mode, if it is no regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "another kind of file")


def list_files(root: Path) -> Iterator[os.DirEntry[str]]:
    """Yield every entry below a folder that is no folder itself. A linked folder is not entered, but yielded.

    Raises:
        OSError: a folder cannot be read. Path.rglob takes such a one for empty.
    """
    folders = [str(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders += [entry.path] if entry.name != _OF_THE_DISK else []
                else:
                    yield entry


def list_names(root: Path) -> list[str]:
    """Name every file below a folder, relative to it, with forward slashes and in order. Raises as `list_files`."""
    return sorted(Path(entry.path).relative_to(root).as_posix() for entry in list_files(root))
