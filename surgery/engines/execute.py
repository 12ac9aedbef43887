"""Run the job of a folder in this process's place: `python -m surgery.engines.execute FOLDER`, as every engine does.

The command gets a session of its own, so that all that it started can be ended with it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from surgery.engines.job import LOG, Job, Result, hold
from surgery.escapes import printable

LIFELINE = "--lifeline"
"""Argument after the folder: end the job when stdin closes, as by the end of the process that started this one."""
APART = "--apart"
"""Argument after the folder: go on in another process than the one that was started, which ends at once."""
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127
_IS_HELD = 75  # EX_TEMPFAIL of sysexits.h


def run_job(folder: str | Path) -> int:
    """Run the job of a folder to its end, unless it has ended before; return its exit code, or minus its signal.

    One that is ended from outside, by SIGTERM or SIGINT to this process, leaves no result. One that another process
    runs already is left alone: two would write over each other.
    """
    folder = Path(folder)
    if before := Result.read(folder):
        return before.code
    job = Job.read(folder)
    begun, started = time.time(), time.monotonic()
    with (folder / LOG).open("ab") as log, Ending() as ending:
        if not hold(log.fileno()):
            return _IS_HELD
        log.truncate(0)
        code, peak = _run(job, log.fileno(), ending)
    if not ending.is_asked:
        Result(code, begun, time.monotonic() - started, peak, socket.gethostname()).write(folder)
    return code


def _run(job: Job, log: int, ending: "Ending") -> tuple[int, int | None]:
    """Run a job's command; return its exit code and its peak memory."""
    kept = {name: value for name, value in os.environ.items() if name not in job.removed}
    try:
        child = subprocess.Popen(
            job.command,
            cwd=job.cwd,
            env=kept | dict(job.variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    except OSError as error:
        os.write(log, f"{printable(str(error.filename or job.command[0]))}: {error.strerror}\n".encode())
        return (_NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE), None
    ending.of(child.pid)
    _, status, usage = os.wait4(child.pid, 0)
    _end_group(child.pid, signal.SIGKILL)  # what it left behind
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Ending:
    """Passes SIGTERM and SIGINT on to all processes of a session, and ends those that do not heed them.

    Attributes:
        is_asked: one of them has come.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._session: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Ending":
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGTERM, signal.SIGINT):
                self._former[each] = signal.signal(each, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._former.items():
            signal.signal(each, handler)

    def of(self, session: int) -> None:
        """Say which session to end."""
        self._session = session
        if self.is_asked:
            end_session(session)

    def _end(self, *_: object) -> None:
        self.is_asked = True
        if self._session is not None:
            end_session(self._session)


def end_session(session: int) -> None:
    """Ask the processes of a session to end, and kill those that have not after ten seconds."""
    _end_group(session, signal.SIGTERM)
    timer = threading.Timer(_GRACE, _end_group, (session, signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _end_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _end_with_parent() -> None:
    """End the job when whoever started this process is gone, also by SIGKILL: then its end of our stdin is closed."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_parent() -> None:
    """Go on as nobody's child: a Ray worker that ends kills its children, who then could not end what they started."""
    if os.fork():
        os._exit(0)


def main() -> None:
    """Run the job of the folder that is named, and exit with its code, as a shell does."""
    if APART in sys.argv[2:]:
        _leave_parent()
    if LIFELINE in sys.argv[2:]:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    code = run_job(sys.argv[1])
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
