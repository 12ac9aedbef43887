"""SurgeryErrors as they are made: what a script, a thread or a framework catches is a refusal all the same."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from surgery.errors import SurgeryError

_here = threading.local()


@contextmanager
def handled() -> Iterator[None]:
    """For the body of a `with`, errors are made that this package catches and reports itself."""
    before = getattr(_here, "is_handled", False)
    _here.is_handled = True
    try:
        yield
    finally:
        _here.is_handled = before


def watch_errors(on_error: Callable[[SurgeryError], None]) -> None:
    """Call a function with every SurgeryError of this process that is made outside of `handled`."""
    begin = SurgeryError.__init__

    @wraps(begin)
    def __init__(self: SurgeryError, message: str) -> None:  # noqa: N807
        begin(self, message)
        if not getattr(_here, "is_handled", False):
            with handled():  # of what the report of an error makes
                on_error(self)

    SurgeryError.__init__ = __init__  # type: ignore[method-assign]
