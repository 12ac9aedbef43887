"""Lay out columns to the terminal's width, with colour if it has any; escape what a terminal would act on."""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import click

from surgery.escapes import printable
from surgery.report.names import least_width, tell_apart
from surgery.report.text import VALUE_AT
from surgery.report.widths import cut, shorten, width_of

_GAP = "  "
_SHORTEST = 8  # what is left of a text that is no name
_NAME = (20, 40)  # what is left of names at least, and at most, before columns go for their sake
_NAME_SHARE = 0.4  # of the width


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
        if text.isascii():
            return textwrap.wrap(text, self.width, subsequent_indent=indent, drop_whitespace=True)
        return _wrap_wide(text, self.width, indent)

    def wrap_all(self, lines: Sequence[str]) -> list[str]:
        """Wrap every line."""
        return [wrapped for line in lines for wrapped in self.wrap(line)]


def _wrap_wide(text: str, width: int, indent: str) -> list[str]:
    """Wrap a text in which a character may take two columns or none, which textwrap does not know."""
    lines, line = [], text[: len(text) - len(text.lstrip(" "))]
    is_empty = True  # but for what it is indented by
    for word in text.split():
        gap = "" if is_empty else " "
        if not is_empty and width_of(line + gap + word) > width:
            lines.append(line)
            line, gap = indent, ""
        while width_of(line + gap + word) > width:
            head = cut(word, width - width_of(line + gap)) or word[:1]
            lines.append(line + gap + head)
            line, gap, word = indent, "", word[len(head) :]
        line, is_empty = line + gap + word, False
    return [*lines, line]


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
        is_name: flexible, and shortened so that no two rows look alike.
        rank: a column of rank 0 stays; of others the highest goes first where the table is still too wide.
    """

    title: str
    is_number: bool = False
    is_flexible: bool = False
    is_name: bool = False
    rank: int = 0


def lay_out(columns: Sequence[Column], rows: Sequence[Sequence[str]], terminal: Terminal) -> list[str]:
    """Return the lines of a table; columns without a cell are left out."""
    cells = [[printable(cell) for cell in row] for row in rows]
    shown = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    widths = {i: max(width_of(text) for text in [columns[i].title, *(row[i] for row in cells)]) for i in shown}
    if terminal.width is not None:
        shown = _squeeze(columns, cells, shown, widths, terminal.width)

    def line(row: Sequence[str]) -> str:
        parts = []
        for i in shown:
            text = shorten(row[i], widths[i])
            blank = " " * (widths[i] - width_of(text))
            text = terminal.alarm(text) if isinstance(row[i], Alarm) else text
            parts.append(blank + text if columns[i].is_number else text + blank)
        return _GAP.join(parts).rstrip()

    return [terminal.bold(line([column.title for column in columns])), *map(line, cells)]


def _squeeze(
    columns: Sequence[Column], cells: Sequence[list[str]], shown: list[int], widths: dict[int, int], width: int
) -> list[int]:
    """Make a table fit: drop columns until it can, then narrow the flexible ones, the widest first."""

    def total(sizes: Sequence[int]) -> int:
        return sum(sizes) + len(_GAP) * (len(sizes) - 1)

    if total([widths[i] for i in shown]) <= width:
        return shown
    least = {i: _least(columns[i], [row[i] for row in cells], widths[i], width) for i in shown}
    while total([least[i] for i in shown]) > width and any(columns[i].rank for i in shown):
        shown = [i for i in shown if i != max(shown, key=lambda i: (columns[i].rank, i))]
    for floor in (least, dict.fromkeys(shown, 1)):
        while total([widths[i] for i in shown]) > width:
            wide = [i for i in shown if (columns[i].is_flexible or columns[i].is_name) and widths[i] > floor[i]]
            if not wide:
                break
            widths[max(wide, key=lambda i: widths[i])] -= 1
    for i in (i for i in shown if columns[i].is_name):
        told = tell_apart([row[i] for row in cells], widths[i])
        for row in cells:
            row[i] = told[row[i]]
    return shown


def _least(column: Column, texts: Sequence[str], natural: int, width: int) -> int:
    """Return how narrow a column may become while others can be dropped instead."""
    if column.is_name:
        least = min(max(int(width * _NAME_SHARE), _NAME[0]), _NAME[1])
        return natural if natural <= least else least_width(texts, least, min(natural, width))
    return min(natural, _SHORTEST) if column.is_flexible else natural
