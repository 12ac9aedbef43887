"""Lines on stderr, whole and above the bars of tqdm; stdout is the command's."""

import logging
import sys
from contextlib import suppress

from surgery.escapes import printable


def say(line: str) -> None:
    """Print a line in one piece, where other ranks print theirs, and above the progress bars that stand there."""
    if sys.stderr is None:
        return
    line = printable(line)
    with suppress(OSError, ValueError):  # nobody reads it any more, or the script has closed it
        if (bars := sys.modules.get("tqdm.std")) is not None:
            bars.tqdm.write(f"{line}\n", file=sys.stderr, end="")
        else:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


class ConsoleHandler(logging.Handler):
    """Prints what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))
