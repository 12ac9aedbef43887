"""Errors of an output folder's disk, one line each, with how to go on; those of other files are left as they are."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import OutputError
from surgery.io_errors import FULL, advice, cause, name_of

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def as_output_error(path: Path, resume: str) -> Iterator[None]:
    """Say what went wrong with the disk of an output folder.

    Raises:
        OutputError: an OSError of the folder, of what is in it, or of a folder that it is in.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is None or not _is_of(path, Path(name_of(error))):
            raise
        raise OutputError(_say(error, path, resume)) from error


def _is_of(folder: Path, file: Path) -> bool:
    return file.is_relative_to(folder) or folder.is_relative_to(file)


def _say(error: OSError, path: Path, resume: str) -> str:
    if error.errno in FULL:
        return (
            f"{path}: expected room on the disk, got {os.strerror(error.errno)}. Finished shards are kept: "
            f"free some space and run `{resume}`."
        )
    if error.errno in _NOT_WRITABLE:
        return f"{path}: expected a folder to write to, got {cause(error)}. Choose another with `out`."
    return (
        f"{name_of(error)}: expected a file that can be written, got {cause(error)}. {advice(error)} "
        f"Finished shards are kept: then run `{resume}`."
    )
