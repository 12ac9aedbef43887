"""A job: one command, run once, in a folder that it shares with whoever waits for it; and what came of it."""

import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from surgery.files import read_file

JOB, RESULT, LOG = "job.json", "result.json", "log.txt"


@dataclass(frozen=True)
class Job:
    """A command to run once.

    Args:
        folder: of its own, which exists: takes job.json, log.txt and result.json. On a cluster, every node sees it.
        command: its arguments, the first the program.
        cwd: the folder to run it in.
        variables: what it gets in its environment beside what is there.
        removed: what it does not get of it.
        cpus: how many it is to have; 0: the engine's default.
        gpus: how many it is to have; None: the engine's default.
        function: `module:name` of what does the same in a process that is there already; takes the folder, and returns
            the exit code.
    """

    folder: Path
    command: tuple[str, ...]
    cwd: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    cpus: int = 0
    gpus: int | None = None
    function: str = ""

    def write(self) -> None:
        """Write job.json, from which any process can run it."""
        document = asdict(self) | {"folder": str(self.folder), "cwd": str(self.cwd)}
        write_whole(self.folder / JOB, json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """Read what `write` wrote."""
        found = json.loads(read_file(folder / JOB))
        return cls(
            folder,
            tuple(found["command"]),
            Path(found["cwd"]),
            found["variables"],
            tuple(found["removed"]),
            found["cpus"],
            found["gpus"],
            found.get("function", ""),
        )


@dataclass(frozen=True)
class Result:
    """How a job ended.

    Args:
        code: its exit code, or minus the signal that ended it.
        begun: when, in seconds since the epoch.
        seconds: wall time.
        peak_memory: bytes resident in the largest of its processes; None where the system does not tell.
        host: where it ran.
    """

    code: int
    begun: float
    seconds: float
    peak_memory: int | None
    host: str

    def write(self, folder: Path) -> None:
        """Write result.json: whole or not at all, and after everything else that the job writes."""
        write_whole(folder / RESULT, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Result | None":
        """Return how the job of a folder ended; None if it has not ended, or was ended before it could say."""
        try:
            found: dict[str, Any] = json.loads(read_file(folder / RESULT))
            return cls(**found)
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @property
    def why(self) -> str:
        """How it ended, in words."""
        if self.code >= 0:
            return f"exit code {self.code}"
        try:
            return f"ended by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"ended by signal {-self.code}"


def hold(log: int) -> bool:
    """Mark an open log as in use: by this process and all that inherit it, until the last of them has ended.

    Return False where another process has done so.
    """
    import fcntl  # not on Windows, where no job is run

    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some disks have no locks
        return True
    return True


def is_held(folder: Path) -> bool:
    """Tell whether processes of a former try at a folder's job still run, on this machine at least."""
    try:
        with (folder / LOG).open("r+b") as log:
            return not hold(log.fileno())  # NFS locks only what is open for writing
    except OSError:
        return False


def note(folder: Path, text: str) -> None:
    """Add a line to a job's log: what its engine knows of its end, where the job itself could not tell."""
    with suppress(OSError), (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"{text}\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, also if the machine goes down in the middle."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        error.filename = str(path)  # fsync's has none
        raise
    finally:
        part.unlink(missing_ok=True)
