"""The end of a trial's log, for a page: so many lines, and no more bytes than its share of the page."""

from dataclasses import dataclass
from pathlib import Path

from surgery.report.study.html import Html, escape

MOST_LINES = 200
MOST_BYTES = 20_000
ALL_LOGS = 1_500_000
"""Bytes that the logs of a page have together."""


@dataclass(frozen=True)
class Tail:
    """The end of a log.

    Args:
        html: its lines, escaped.
        lines: how many.
        is_whole: nothing was left out.
    """

    html: Html
    lines: int
    is_whole: bool


def share(trials: int) -> int:
    """Return how many bytes of its log each of so many trials has in the page."""
    return min(MOST_BYTES, ALL_LOGS // max(trials, 1))


def read_tail(log: Path, room: int) -> Tail | None:
    """Return the last lines of a log that take no more bytes than `room` when they are escaped; None if there is none.

    Of a bar that was drawn again and again on a line, the last is kept.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            start = max(0, size - 16 * room)  # bars take most of many logs
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    lines = text.rstrip("\n").split("\n")
    if start:
        del lines[0]  # its beginning is missing
    kept: list[Html] = []
    left = room
    for line in reversed(lines):
        shown = _as_shown(line, left)
        left -= len(shown.encode()) + 1
        if left < 0 or len(kept) == MOST_LINES:
            break
        kept.append(shown)
    return Tail(Html("\n".join(reversed(kept))), len(kept), not start and len(kept) == len(lines))


def _as_shown(line: str, room: int) -> Html:
    last = next((part for part in reversed(line.split("\r")) if part.strip()), "")
    return escape((last if len(last) <= room else last[:room]).expandtabs())
