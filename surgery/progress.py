"""A tqdm bar of bytes: on stderr if that is a terminal, in a notebook as its widget, and nowhere else.

HF_HUB_DISABLE_PROGRESS_BARS turns all of them off.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

LATE = 1.0
"""Seconds that work in a notebook goes on before a bar is drawn: what a cell has shown once stays in its file."""
_TEXT = 2.0  # seconds between two drawings of a bar as text, each of which such a file keeps


@contextmanager
def bar(nbytes: int, what: str) -> Iterator[Callable[[int], object]]:
    """Show a bar of `nbytes` for the body, which calls what it is given with the bytes that have passed."""
    settings: dict[str, Any] = {"total": nbytes, "desc": what, "unit": "B", "unit_scale": True, "leave": False}
    if not is_shown():
        yield lambda _: None
    elif is_notebook():
        with closing(_LateBar(settings)) as late:
            yield late.update
    else:
        from tqdm import tqdm

        with tqdm(file=sys.stderr, **settings) as progress:
            yield progress.update


def is_shown() -> bool:
    """Tell whether there is anybody to see a bar who has not turned them off."""
    disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    return not disabled and (is_notebook() or sys.stderr.isatty())


def is_notebook() -> bool:
    """Tell whether a Jupyter kernel runs us. A kernel has imported IPython; nobody else waits for it."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return "IPKernelApp" in getattr(get_shell(), "config", ())


def has_widgets() -> bool:
    """Tell whether the bars of tqdm.auto are a notebook's widgets; that takes ipywidgets."""
    from tqdm.notebook import tqdm_notebook

    return issubclass(_auto_tqdm(), tqdm_notebook)


def notebook_settings() -> dict[str, Any]:
    """Return what a bar of tqdm.auto is made with in a notebook: as text, it would stand in red on stderr."""
    return {"file": sys.stdout, "mininterval": 0.1 if has_widgets() else _TEXT}


def _auto_tqdm() -> Any:
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # there is no ipywidgets: a bar of text will do
        from tqdm.auto import tqdm
    return tqdm


class _LateBar:
    """A bar that is made when its work has taken a second, in whichever thread that is.

    Args:
        settings: of tqdm.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._due = time.monotonic() + LATE
        self._passed = 0
        self._bar: Any = None
        self._lock = threading.Lock()

    def update(self, n: int) -> None:
        with self._lock:
            self._passed += n
            if self._bar is not None:
                self._bar.update(n)
            elif time.monotonic() >= self._due:
                self._bar = _auto_tqdm()(initial=self._passed, **notebook_settings(), **self._settings)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


if is_notebook():  # the first import of it warns where there is no ipywidgets, and huggingface_hub imports it too
    _auto_tqdm()
