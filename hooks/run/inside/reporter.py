"""What a process has to say for itself: lines on stderr as it goes on, and the record that it leaves."""

import os
import time
from collections.abc import Sequence

from surgery.errors import SurgeryError

from ..console import say
from ..folder import run_dir
from ..messages import find_rank, told
from ..options import Options
from ..outcome import conclude
from ..record import Record
from .models import Model

_SECONDS_BETWEEN_RECORDS = 1


class Account:
    """The record of one process.

    Args:
        options: what was asked for.
    """

    def __init__(self, options: Options) -> None:
        self.record = Record(os.getpid(), has_torch=True)
        self._options = options
        self._is_child = False
        self._written = 0.0

    def tell(self, model: Model) -> None:
        """Say what was done to a model."""
        _say(told(self._options, model))

    def note(self, text: str) -> None:
        """Say what else should be known, once."""
        self._add(text, self.record.notes)

    def blame(self, text: str) -> None:
        """Say why a regularizer has no effect, once."""
        self._add(text, self.record.faults)

    def _add(self, text: str, said: list[str]) -> None:
        if text not in said:
            said.append(text)
            _say(text)

    def fail(self, error: SurgeryError) -> None:
        """Take in why a regularizer has ended the script."""
        self.record.faults.append(str(error))
        self.record.is_refused = True

    def fork(self) -> None:
        """Begin anew, in a child process."""
        self.record = Record(os.getpid(), has_torch=True)
        self._is_child = True

    @property
    def is_idle(self) -> bool:
        """It is another process's, or that of a child that trains nothing."""
        return self.record.pid != os.getpid() or (self._is_child and not self.record.has_trained)

    def write(self, models: Sequence[Model], *, is_last: bool) -> None:
        """Bring the record up to date, and leave it where `surgery run` looks for it.

        Args:
            is_last: measure all; else only if the last time was a while ago, for a process that is killed.
        """
        if not is_last and time.monotonic() - self._written < _SECONDS_BETWEEN_RECORDS:
            return
        self._written = time.monotonic()
        self.record.rank = find_rank()
        self.record.models = [model.look(is_last=is_last) for model in models]
        self.record.acts = sorted({act for model in models for act in model.acts})
        if folder := run_dir():
            self.record.write(folder)

    def end(self, models: Sequence[Model]) -> None:
        """Write for the last time; without a `surgery run` to read it, say what came out."""
        self.write(models, is_last=True)
        if self.record.has_trained and run_dir() is None:
            conclude(self.record, self._options)


def _say(text: str) -> None:
    say(f"surgery: rank {find_rank()}: {text}")
