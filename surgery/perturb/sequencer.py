"""A turnstile for threads: what they do at once in any order goes on in its own, until a signal stops them all."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StoppedError(Exception):
    """Another thread failed, or the user interrupted the run."""


class Sequencer:
    """Lets numbered pieces through one at a time, in order."""

    def __init__(self, stop: threading.Event) -> None:
        self._condition = threading.Condition()
        self._next = 0
        self._stop = stop

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        with self._condition:
            while self._next != number:
                if self._stop.is_set():
                    raise StoppedError
                self._condition.wait(0.1)
        yield
        with self._condition:
            self._next += 1
            self._condition.notify_all()
