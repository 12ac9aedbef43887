"""Errors are one line that a terminal can show, whatever a checkpoint puts into them."""

from surgery.errors import SourceError
from surgery.escapes import printable


def test_what_a_terminal_acts_on_is_escaped() -> None:
    assert printable("a\x1b[0m\n\u202e\ud800層") == r"a\x1b[0m\n\u202e\ud800層"


def test_error_is_one_printable_line() -> None:
    assert str(SourceError("a\x1b[31m\nb\ud800: expected 層, got é.")) == r"a\x1b[31m\nb\ud800: expected 層, got é."
