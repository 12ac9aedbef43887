"""From the import of torch to the end of a process."""

import logging
import os
import sys
from functools import partial
from multiprocessing import util
from typing import Any

from surgery.errors import SurgeryError

from ..console import ConsoleHandler
from ..options import read_options
from .instrument import listen
from .session import Session


def begin() -> None:
    """Watch this process train, if its environment asks for a regularizer.

    Raises:
        SettingError: a SURGERY_ variable is wrong; the import of torch fails with it.
    """
    options = read_options(os.environ)
    if options is None:
        return
    _show_warnings()
    session = Session(options)
    listen(session)
    _listen_to_errors(session)
    _await_end(session)
    os.register_at_fork(after_in_child=partial(_fork, session))
    util.register_after_fork(session, _await_end)


def _show_warnings() -> None:
    """Print what surgery logs in the form of its other lines, whatever the script makes of its own log."""
    handler = ConsoleHandler()
    handler.setFormatter(logging.Formatter("surgery: %(message)s"))
    logger = logging.getLogger("surgery")
    logger.addHandler(handler)
    logger.propagate = False


def _listen_to_errors(session: Session) -> None:
    """Have an error of ours that ends the script end the run as what it is: a regularizer without effect."""
    show = sys.excepthook

    def excepthook(kind: Any, error: BaseException, trace: Any) -> None:
        if isinstance(error, SurgeryError):
            session.account.fail(error)
        show(kind, error, trace)

    sys.excepthook = excepthook


def _await_end(session: Session) -> None:
    # not atexit, which children of multiprocessing skip
    util.Finalize(None, session.end, exitpriority=_FIRST)


def _fork(session: Session) -> None:
    """Begin anew in a child. Those of multiprocessing forget all finalizers after this."""
    session.account.fork()
    _await_end(session)


_FIRST = 1000
