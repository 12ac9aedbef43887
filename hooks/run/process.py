"""From the import of torch to the end of a process."""

import os
from multiprocessing import util

from .order import read_order
from .seams import listen
from .session import Session


def begin() -> None:
    """Watch this process train, if its environment asks for a regularizer.

    Raises:
        SettingError: a SURGERY_ variable is wrong; the import of torch fails with it.
    """
    order = read_order(os.environ)
    if order is None:
        return
    session = Session(order)
    listen(session)
    _await_end(session)
    util.register_after_fork(session, _fork)


def _await_end(session: Session) -> None:
    # not atexit, which children of multiprocessing skip
    util.Finalize(None, session.end, exitpriority=_FIRST)


def _fork(session: Session) -> None:
    """Begin anew in a child of multiprocessing, which has forgotten the parent's finalizers."""
    session.fork()
    _await_end(session)


_FIRST = 1000
