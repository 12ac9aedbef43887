"""Ctrl-C of the command line: one line and exit code 130, at any moment, also twice in a row; installed by __main__.

Outside of a command's own work, as while modules are imported, the handler ends the process itself: KeyboardInterrupt
would be a traceback there. Within it, the first one raises KeyboardInterrupt, so that files are left as they should be,
and a second one ends the process; what was written so far is resumed by the same command.
"""

# what signal wraps: signal itself imports enum, and until then Ctrl-C would be a traceback
import _signal  # type: ignore[import-not-found]
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from surgery.exit_codes import INTERRUPTED, JSON_VERSION

MESSAGE = "interrupted: run the same command again."


class _State:
    """What the handler knows of this process."""

    is_installed = False
    is_raising = False
    has_raised = False
    wants_json = False
    has_answered = False


class Raising:
    """Have Ctrl-C raise KeyboardInterrupt, once, in the body of `with`."""

    def __enter__(self) -> None:
        _State.is_raising = True

    def __exit__(self, *_: object) -> None:
        _State.is_raising = False


def install(arguments: Sequence[str]) -> None:
    """Take over SIGINT for the rest of this process, unless it is ignored, as in the background of a script."""
    _State.wants_json = wants_json(arguments)
    if _signal.getsignal(_signal.SIGINT) is not _signal.default_int_handler:
        return
    _signal.signal(_signal.SIGINT, _handle)
    _State.is_installed = True
    report = sys.unraisablehook

    def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is KeyboardInterrupt:  # Python has swallowed it, as that of a __del__
            end()
        report(unraisable)

    sys.unraisablehook = unraisablehook


def wants_json(arguments: Sequence[str]) -> bool:
    """Tell from a command line, which need not be a valid one, whether its errors are wanted as JSON."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    command = next((word for word in own if not word.startswith("-")), None)
    return "--json" in own and command != "run"  # whose other arguments are another program's


def ignore() -> None:
    """Take no notice of Ctrl-C any more: what is left is to say how it went."""
    if _State.is_installed:
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)


def leave() -> None:
    """Let the process end undisturbed; at once, after Ctrl-C, for threads and libraries may still be at work."""
    ignore()
    if _State.has_raised:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(INTERRUPTED)


def has_raised() -> bool:
    """Tell whether KeyboardInterrupt was raised, whatever a library has made of it since."""
    return _State.has_raised


def answered() -> None:
    """Note that the JSON of this process is being printed: there is to be no second one."""
    _State.has_answered = _State.is_installed


def has_answered() -> bool:
    """Tell whether JSON was printed."""
    return _State.has_answered


def end() -> None:
    """End the process as interrupted, past all that still runs in it."""
    if _State.wants_json and not _State.has_answered:
        _write(1, f'{{\n "version": {JSON_VERSION},\n "error": "{MESSAGE}"\n}}\n')
    _write(2, f"{MESSAGE}\n")
    os._exit(INTERRUPTED)


def _write(descriptor: int, text: str) -> None:
    with suppress(OSError):  # closed, or nobody reads it
        os.write(descriptor, text.encode())


def _handle(_number: int, _frame: object) -> None:
    if not _State.is_raising or _State.has_raised:
        end()
    _State.has_raised = True
    raise KeyboardInterrupt
