"""What sitecustomize calls in every Python of a command: leave a first record; once torch is there, start a Session.

At the top of this file stands nothing heavy: most Pythons of a command never import torch.
"""

import json
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...imports import PRETRAINED_CLASSES, call_after_import, watch_import
from ...trackers.install import install
from ..folder import run_dir

if TYPE_CHECKING:
    from ..options import Options
    from .session import Session

_BEFORE_OTHERS = 1000
"""The priority of our finalizer among those of multiprocessing."""


def start() -> None:
    """Leave a first record, which says that this Python can be reached, and wait for torch."""
    call_after_import("torch", _start_session)
    for module in PRETRAINED_CLASSES:  # which may be the first that imports torch
        watch_import(module)
    install()
    if folder := run_dir():
        with suppress(OSError):  # of a full disk, `surgery run` says what it knows
            _write_first_record(folder / f"{os.getpid()}.json")


def _write_first_record(path: Path) -> None:
    if path.exists():  # of this process before an exec, or of another one that is dead
        path.rename(path.with_stem(f"{path.stem}-{time.time_ns()}"))
    path.write_text(json.dumps({"pid": os.getpid()}))


def _start_session() -> None:
    """Regularize what this process trains, if its environment asks for it.

    Raises:
        SettingError: a SURGERY_ variable is wrong; the import of torch fails with it.
    """
    from multiprocessing import util

    from ...refusals import watch_errors
    from ...trackers.figures import announce
    from ..options import read_options
    from .instrument import instrument
    from .session import Session

    options = read_options(os.environ)
    if options is None:
        return
    _print_warnings()
    announce(options.methods, **options.others)
    session = Session(options)
    instrument(session)
    watch_errors(session.on_error)
    _shorten_tracebacks(options)
    _finalize(session)
    os.register_at_fork(after_in_child=partial(_restart, session))
    util.register_after_fork(session, _finalize)


def _print_warnings() -> None:
    """Print what surgery logs in the form of its other lines, whatever the script makes of its own log."""
    import logging

    from ..console import ConsoleHandler

    handler = ConsoleHandler()
    handler.setFormatter(logging.Formatter("surgery: %(message)s"))
    logger = logging.getLogger("surgery")
    logger.addHandler(handler)
    logger.propagate = False


def _shorten_tracebacks(options: "Options") -> None:
    """Print an error of ours that ends the script, or a thread, as one line, unless --debug asks for its traceback."""
    import threading

    from surgery.errors import SurgeryError

    from ..console import say

    show, show_in_thread = sys.excepthook, threading.excepthook

    def excepthook(kind: Any, error: BaseException, trace: Any) -> None:
        if isinstance(error, SurgeryError) and not options.debug:
            say(f"surgery: error: {error}")
        else:
            show(kind, error, trace)

    def excepthook_of_threads(args: Any) -> None:
        if isinstance(args.exc_value, SurgeryError) and not options.debug:
            say(f"surgery: error: {args.exc_value}")
        else:
            show_in_thread(args)

    sys.excepthook, threading.excepthook = excepthook, excepthook_of_threads


def _finalize(session: "Session") -> None:
    """Have multiprocessing tell the session of the process's end: its children skip atexit."""
    from multiprocessing import util

    util.Finalize(None, session.on_exit, exitpriority=_BEFORE_OTHERS)


def _restart(session: "Session") -> None:
    """Begin anew in a child. Those of multiprocessing forget all finalizers after this."""
    session.on_fork()
    _finalize(session)
