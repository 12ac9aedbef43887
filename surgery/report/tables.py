"""Lay out columns to the terminal's width, with colour if it has any; escape what a terminal would act on."""

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import click

from surgery.escapes import printable
from surgery.report.text import VALUE_AT

_GAP = "  "
_SHORTEST = 12  # what is left of a name


@dataclass(frozen=True)
class Terminal:
    """How wide lines may be, in columns, or None for as wide as they are; and whether to use colour."""

    width: int | None = None
    color: bool = False

    def bold(self, text: str) -> str:
        return click.style(text, bold=True) if self.color else text

    def alarm(self, text: str) -> str:
        """Mark what is wrong."""
        return click.style(text, fg="red") if self.color else text

    def wrap(self, text: str) -> list[str]:
        """Break a labelled line where it reaches the width, and go on below its value."""
        text = printable(text)
        if self.width is None or width_of(text) <= self.width:
            return [text]
        indent = " " * min(VALUE_AT, self.width // 2)
        lines = textwrap.wrap(text, self.width, subsequent_indent=indent, drop_whitespace=True)
        return [shorten(line, self.width) for line in lines]  # textwrap takes wide characters for narrow

    def wrap_all(self, lines: Sequence[str]) -> list[str]:
        """Wrap every line."""
        return [wrapped for line in lines for wrapped in self.wrap(line)]


def stdout_terminal() -> Terminal:
    """Return the terminal's width and colour, unless NO_COLOR is set; a pipe has neither."""
    if not sys.stdout.isatty():
        return Terminal()
    return Terminal(shutil.get_terminal_size().columns, not os.environ.get("NO_COLOR"))


class Alarm(str):
    """A cell that says what is wrong."""

    __slots__ = ()


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        title: in the header.
        is_number: aligned to the right.
        is_flexible: shortened in the middle where the table is too wide.
        rank: columns of rank 0 stay; of others the highest goes first where the table is still too wide.
    """

    title: str
    is_number: bool = False
    is_flexible: bool = False
    rank: int = 0


def lay_out(columns: Sequence[Column], rows: Sequence[Sequence[str]], terminal: Terminal) -> list[str]:
    """Return the lines of a table; columns without a cell are left out."""
    cells = [[printable(cell) for cell in row] for row in rows]
    shown = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    widths = {i: max(width_of(text) for text in [columns[i].title, *(row[i] for row in cells)]) for i in shown}
    if terminal.width is not None:
        shown = _squeeze(columns, shown, widths, terminal.width)

    def line(row: Sequence[str]) -> str:
        parts = []
        for i in shown:
            text = shorten(row[i], widths[i])
            blank = " " * (widths[i] - width_of(text))
            text = terminal.alarm(text) if isinstance(row[i], Alarm) else text
            parts.append(blank + text if columns[i].is_number else text + blank)
        return _GAP.join(parts).rstrip()

    return [terminal.bold(line([column.title for column in columns])), *map(line, cells)]


def _squeeze(columns: Sequence[Column], shown: list[int], widths: dict[int, int], width: int) -> list[int]:
    """Make a table fit: drop columns until it can, then narrow the flexible ones, the widest first."""

    def least(i: int) -> int:
        return min(widths[i], _SHORTEST) if columns[i].is_flexible else widths[i]

    def total(sizes: Sequence[int]) -> int:
        return sum(sizes) + len(_GAP) * (len(sizes) - 1)

    while total([least(i) for i in shown]) > width and any(columns[i].rank for i in shown):
        shown = [i for i in shown if i != max(shown, key=lambda i: (columns[i].rank, i))]
    while total([widths[i] for i in shown]) > width:
        narrowed = max((i for i in shown if columns[i].is_flexible), key=lambda i: widths[i])
        if widths[narrowed] <= 1:
            break
        widths[narrowed] -= 1
    return shown


def shorten(text: str, width: int) -> str:
    """Cut a text in the middle, where names differ least."""
    if width_of(text) <= width:
        return text
    head = text[: (width - 1) // 2]
    tail = text[len(text) - (width - 1 - len(head)) :] if width - 1 > len(head) else ""
    while width_of(head) + width_of(tail) > width - 1:
        head, tail = (head[:-1], tail) if width_of(head) >= width_of(tail) else (head, tail[1:])
    return f"{head}…{tail}"


def width_of(text: str) -> int:
    """Return how many columns a printable text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
