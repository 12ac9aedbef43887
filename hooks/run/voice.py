"""What surgery says while a script runs: whole lines on stderr."""

import logging
import sys


def say(line: str) -> None:
    """Print a line, above the progress bars that the script has on the screen."""
    if (bars := sys.modules.get("tqdm.std")) is not None:
        bars.tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)  # noqa: T201


class Voice(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))
