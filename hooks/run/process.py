"""From the import of torch to the end of a process."""

import os
from functools import partial
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
    os.register_at_fork(after_in_child=partial(_fork, session))
    util.register_after_fork(session, _await_end)


def _await_end(session: Session) -> None:
    # not atexit, which children of multiprocessing skip
    util.Finalize(None, session.end, exitpriority=_FIRST)


def _fork(session: Session) -> None:
    """Begin anew in a child. Those of multiprocessing forget all finalizers after this."""
    session.fork()
    _await_end(session)


_FIRST = 1000
