"""Keep names from acting on a terminal: in messages, logs, commands to copy, and whatever is printed at last.

The names in a checkpoint, a recipe or an answer of the Hub are their author's, and may hold escape sequences.
"""

import io
import logging
import os
import re
import shlex
from collections.abc import Iterable

_MOVES = re.compile(r"(?:\n|\x1b\[A)*")  # how tqdm goes from bar to bar


def printable(text: str) -> str:
    """Escape what a terminal would act on: controls, newlines, overrides of direction, halves of surrogate pairs."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shell_quote(text: str) -> str:
    """Quote one argument for a POSIX shell, which gets its very bytes, in printable characters."""
    if text.isprintable():
        return shlex.quote(text)
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair, which no path holds
        data = text.encode("utf-8", "surrogatepass")
    codes = (f"\\0{byte:03o}" if not 32 <= byte < 127 or byte in b"'\\" else chr(byte) for byte in data)
    return f"\"$(printf %b '{''.join(codes)}')\""


def shell_join(words: Iterable[str]) -> str:
    """Write a command for a POSIX shell."""
    return " ".join(map(shell_quote, words))


def get_logger(name: str) -> logging.Logger:
    """Return a logger whose messages are one printable line each."""
    logger = logging.getLogger(name)
    logger.addFilter(_escape_record)
    return logger


def _escape_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


class EscapedStream(io.TextIOWrapper):
    """A terminal's or a pipe's text, in which only newlines, tabs and what is allowed by name act.

    Args:
        stream: in whose place it writes.
        allowed: escape sequences of our own, such as those of colours.
    """

    def __init__(self, stream: io.TextIOWrapper, allowed: Iterable[str] = ()) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._kept = re.compile("|".join(["[\n\t]", *map(re.escape, allowed)]))

    def write(self, text: str) -> int:
        super().write(self._escape(text))
        return len(text)

    def _escape(self, text: str) -> str:
        if text.isprintable() or _MOVES.fullmatch(text):
            return text
        if text[0] == "\r":  # a bar that is drawn again
            return f"\r{self._escape(text[1:])}"
        kept = [*self._kept.findall(text), ""]
        parts = map(printable, self._kept.split(text))
        return "".join(part + own for part, own in zip(parts, kept, strict=True))
