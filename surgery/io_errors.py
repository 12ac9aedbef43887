"""What the system says of a file, in one line with its name: descriptors fail without a name, limits without theirs."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:  # here, since nothing can be imported once there are too many open files
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk without room says."""
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.EBADF)
"""What a file system says of a call that it does not know."""
TOO_MANY = (errno.EMFILE, errno.ENFILE)
"""What it says of one more open file."""
_OF_RUST = re.compile(r"\(os error (\d+)\)")
_ADVICE = {
    errno.EACCES: "Check its permissions.",
    errno.EPERM: "Check its permissions.",
    errno.ENOENT: "Check its name.",
    errno.ENOTDIR: "Check its name.",
    errno.EISDIR: "Check its name.",
    errno.ENAMETOOLONG: "Use a shorter one.",
    errno.EMFILE: "Raise that limit, or use fewer `workers`.",
    errno.ENFILE: "Close other programs, or have fs.file-max raised.",
    **dict.fromkeys(FULL, "Free some space."),
}


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name a file in the errors of its descriptor, which name none, and in those of libraries written in Rust."""
    try:
        yield
    except OSError as error:
        if error.errno is None and (found := _OF_RUST.search(str(error))):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def cause(error: OSError) -> str:
    """Return what the system said, and of open files how many there may be."""
    said = os.strerror(error.errno) if error.errno is not None else str(error)
    return (
        f"{said}, of which this process may have {_most_files()} (ulimit -n)" if error.errno == errno.EMFILE else said
    )


def advice(error: OSError) -> str:
    """Return what to do about it."""
    return _ADVICE.get(error.errno or 0, "Check the disk that it is on.")


def one_line(error: BaseException) -> str:
    """Return `<file>: expected X, got Y. <What to do>.` of a file's error, and what any other says."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    return f"{name_of(error)}: expected it to be readable and writable, got {cause(error)}. {advice(error)}"


def name_of(error: OSError) -> str:
    """Return the file that an error is about; of a renaming, the new name."""
    return os.fsdecode(error.filename if error.filename2 is None else error.filename2)


def _most_files() -> int | str:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else "no more"
