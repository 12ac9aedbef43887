"""stdout and stderr of the command's process, through which no name reaches the terminal as it is."""

import io
import sys

import click

from surgery.escapes import EscapedStream

_RESET = click.style("", bold=True).removeprefix("\x1b[1m")
_COLOURS = ("\x1b[1m", "\x1b[31m", _RESET)
"""Of tables: bold, red, and neither."""


def guard_streams() -> None:
    """Escape what is printed from now on, our own and what libraries log and draw."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = EscapedStream(sys.stdout, _COLOURS)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = EscapedStream(sys.stderr)
