"""Run the function of a job's folder in this process, which is there already and has imported what it needs."""

import resource
import socket
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

from surgery.engines.job import LOG, Job, Result, hold


def run_inside(folder: str | Path) -> None:
    """Do what the function of a folder's job does; its log takes what that prints, and a result is left as ever."""
    folder = Path(folder)
    module, _, name = Job.read(folder).function.partition(":")
    begun, started = time.time(), time.monotonic()
    with (folder / LOG).open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        hold(log.fileno())
        try:
            code = int(getattr(import_module(module), name)(folder))
        except Exception:
            traceback.print_exc()
            code = 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    Result(code, begun, time.monotonic() - started, peak, socket.gethostname()).write(folder)
