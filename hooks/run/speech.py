"""What a run says: lines on stderr, for stdout is the command's."""

import sys
from contextlib import suppress


def say(line: str) -> None:
    """Print a line in one piece, where other ranks print theirs, and over a progress bar that stands there."""
    if sys.stderr is None:
        return
    with suppress(OSError):  # nobody reads it any more
        start = "\r\033[K" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{start}{line}\n")
        sys.stderr.flush()
