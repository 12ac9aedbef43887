"""A tqdm bar of bytes on stderr: on a terminal only, and not if HF_HUB_DISABLE_PROGRESS_BARS is set."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(nbytes: int, what: str) -> Iterator[Callable[[int], object]]:
    """Show a bar of `nbytes` for the body, which calls what it is given with the bytes that have passed."""
    disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    if disabled or not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=nbytes, desc=what, unit="B", unit_scale=True, leave=False, file=sys.stderr) as progress:
        yield progress.update
