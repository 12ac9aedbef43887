"""How far a study is: a bar with the time left on a terminal, and a line for each trial."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from surgery.escapes import printable
from surgery.progress import is_shown
from surgery.study.summary import figure

if TYPE_CHECKING:
    from surgery.study.run import Progress


@contextmanager
def following(metric: str) -> Iterator[Callable[["Progress"], None]]:
    """Show how far a study is, on stderr, for the body, which calls what it is given for each trial."""
    if not is_shown():
        begun = time.monotonic()
        first: list[int] = []

        def follow(progress: "Progress") -> None:
            first.append(progress.done)
            if progress.latest:
                left = _left(progress, first[0], time.monotonic() - begun)
                click.echo(f"{_line(progress, metric)} ({progress.done} of {progress.total}{left})", err=True)

        yield follow
        return
    from tqdm import tqdm

    with tqdm(desc="trials", unit="trial", leave=False, file=sys.stderr) as shown:

        def advance(progress: "Progress") -> None:
            shown.total = progress.total
            if progress.latest:
                shown.write(_line(progress, metric), file=sys.stderr)
                shown.update(progress.done - shown.n)
            else:
                shown.initial = shown.n = progress.done
                shown.refresh()

        yield advance


def _line(progress: "Progress", metric: str) -> str:
    found = progress.latest
    assert found
    what = f"{metric} {figure(found.metric.value)}" if found.metric else f"{found.status.value}: {found.why}"
    seconds = f", {found.result.seconds:.0f} s" if found.result and found.result.seconds else ""
    return printable(f"{found.trial.arm.name}, seed {found.trial.seed}: {what}{seconds}")


def _left(progress: "Progress", first: int, seconds: float) -> str:
    ended = progress.done - first
    left = seconds / ended * (progress.total - progress.done) if ended else 0.0
    if left < 60:
        return ""
    return f", about {left / 3600:.1f} h left" if left >= 5400 else f", about {left / 60:.0f} min left"
