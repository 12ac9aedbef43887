"""Lines of a run on stderr: whole, above progress bars, and no trouble where nobody reads them."""

import io
import os
import sys
from typing import Any

import pytest
from tqdm import tqdm

from surgery.hooks.run.console import say


class Terminal(io.RawIOBase):
    """Keeps what arrives, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self.pieces.append(bytes(piece))
        return len(piece)


def listen(patch: pytest.MonkeyPatch, *, has_tqdm: bool = True) -> Terminal:
    """Be this process's stderr."""
    terminal = Terminal()
    patch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(terminal), line_buffering=True))
    if not has_tqdm:
        patch.delitem(sys.modules, "tqdm.std")
    return terminal


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_line_arrives_in_one_piece(has_tqdm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = listen(monkeypatch, has_tqdm=has_tqdm)
    say("surgery: " + "long " * 4000)
    assert terminal.pieces == [b"surgery: " + b"long " * 4000 + b"\n"]


def test_line_stands_above_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = listen(monkeypatch)
    with tqdm(total=4, desc="steps", ncols=60) as bar:
        terminal.pieces.clear()
        say("surgery: active")
        drawn = terminal.pieces.pop()
        bar.update()
    cleared = [b"\r" + b" " * 60, b"\r"]
    assert terminal.pieces[:3] == [*cleared, b"surgery: active\n"]
    assert drawn.startswith(b"\rsteps:   0%|")
    assert capsys.readouterr().out == ""


def closed() -> Any:
    file = io.StringIO()
    file.close()
    return file


def unread() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("has_tqdm", [True, False])
@pytest.mark.parametrize("stderr", [lambda: None, closed, unread], ids=["none", "closed", "unread"])
def test_line_that_nobody_reads_is_no_error(stderr: Any, has_tqdm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_tqdm:
        monkeypatch.delitem(sys.modules, "tqdm.std")
    monkeypatch.setattr(sys, "stderr", stderr())
    say("surgery: active")
