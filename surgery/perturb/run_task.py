"""Do the task of a folder: `python -m surgery.perturb.run_task FOLDER`, or its function in a process that is there."""

import sys
from pathlib import Path

from surgery.errors import OutputError, SettingError, SourceError, SurgeryError
from surgery.io_errors import one_line
from surgery.perturb.shared import GoneError
from surgery.perturb.task import Task

KINDS: dict[int, type[SurgeryError]] = {65: SourceError, 73: OutputError, 78: SettingError, 70: SurgeryError}
"""What an error of a task is for its driver, by the exit code: those of sysexits.h. The last is any other."""


def run_task(folder: Path) -> int:
    """Do a task; return its exit code, with an error in one line on stderr."""
    try:
        Task.read(folder).run()
    except GoneError:  # nobody waits for it any more
        return 0
    except (SurgeryError, OSError, MemoryError) as error:
        sys.stderr.write(f"{one_line(error)}\n")
        return next((code for code, kind in KINDS.items() if isinstance(error, kind)), 70)
    return 0


if __name__ == "__main__":
    sys.exit(run_task(Path(sys.argv[1])))
