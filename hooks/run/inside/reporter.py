"""What a process reports: lines on stderr as it goes on, and the JSON record that it leaves for `surgery run`."""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import NoReturn

from torch import nn

from surgery.exit_codes import INACTIVE

from ..console import say
from ..folder import run_dir
from ..messages import describe_model, find_rank, find_speaker
from ..options import Options
from ..record import Record
from ..report import Command, print_outcome
from .models import Model

_SECONDS_BETWEEN_RECORDS = 1


class Reporter:
    """The record of one process.

    Args:
        options: what was asked for.
    """

    def __init__(self, options: Options) -> None:
        self.record = Record(os.getpid(), has_torch=True)
        self._options = options
        self._command = Command(sys.orig_argv)
        self.has_refused = False
        """A model was to be regularized, and could not be."""
        self._is_child = False
        self._written = 0.0

    def report_model(self, model: Model) -> None:
        """Print what was done to a model."""
        _say(describe_model(self._options, model))

    def say(self, text: str) -> None:
        """Print a line that is no part of the report."""
        _say(text)

    def add_note(self, text: str) -> None:
        """Report what else should be known, once."""
        self._add(text, self.record.notes)

    def add_fault(self, text: str) -> None:
        """Report why a regularizer has no effect, once."""
        self._add(text, self.record.faults)

    def refuse(self, names: Sequence[str], root: nn.Module, reason: str) -> None:
        """Report which regularizers a model cannot have, and why."""
        self.has_refused = True
        self.record.refused = sorted({*self.record.refused, *names})
        kind = f"{type(root).__name__}: "
        self.add_fault(f"{' and '.join(names)}: {kind}{reason.removeprefix(kind)}")

    def _add(self, text: str, reported: list[str]) -> None:
        if text not in reported:
            reported.append(text)
            _say(text)

    def refuse_process(self, reason: str, models: Iterable[Model]) -> None:
        """Take in why a regularizer cannot go on, at once: the process may be ended before it ends by itself."""
        if reason not in self.record.faults:
            self.record.faults.append(reason)
        self.record.is_refused = True
        self.write(models, is_last=False)

    def exit_inactive(self, models: Iterable[Model]) -> NoReturn:
        """End the process, for nothing can take effect in it."""
        self.record.is_refused = True
        self.record.is_final = True
        self.write(models, is_last=True)
        raise SystemExit(INACTIVE)

    def on_fork(self) -> None:
        """Begin anew, in a child process."""
        self.record = Record(os.getpid(), has_torch=True)
        self._is_child = True

    @property
    def has_nothing_to_report(self) -> bool:
        """It is another process's, or that of a child that trains nothing."""
        is_idle = not (self.record.has_trained or self.record.is_refused)
        return self.record.pid != os.getpid() or (self._is_child and is_idle)

    def write_again(self, models: Iterable[Model]) -> None:
        """Bring the record up to date if the last time was a while ago, for a process that is killed."""
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_RECORDS:
            self.write(models, is_last=False)

    def write(self, models: Iterable[Model], *, is_last: bool) -> None:
        """Bring the record up to date, and leave it where `surgery run` looks for it.

        Args:
            is_last: measure all.
        """
        self._written = time.monotonic()
        self.record.rank = find_rank()
        self.record.models = [model.entry(is_last=is_last) for model in models]
        self.record.acts = sorted({act for model in models for act in model.acts})
        if folder := run_dir():
            self.record.write(folder)

    def end(self, models: Iterable[Model]) -> None:
        """Write for the last time; without a `surgery run` to read it, print the outcome."""
        for model in models:
            model.entry(is_last=False)
            self.record.notes += (f"{model.name}: {text}" for text in model.remarks)
        self.record.is_final = True
        self.write(models, is_last=True)
        if self.record.has_trained and run_dir() is None:
            print_outcome(self.record, self._options, self._command)


def _say(text: str) -> None:
    say(f"{find_speaker()}{text}")
