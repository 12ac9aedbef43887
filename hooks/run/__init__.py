"""`surgery run` inside the processes of a command: each starts here, and wakes when it imports torch."""

import json
import os
from pathlib import Path

from .imports import after

RUN_DIR = "SURGERY_RUN_DIR"
"""Set by `surgery run` alone: the folder that every process of the command leaves its record in."""


def start() -> None:
    """Leave word that this Python can be reached, and wait for torch. Every Python below runs it: keep it light."""
    if folder := run_dir():
        (folder / f"{os.getpid()}.json").write_text(
            json.dumps({"pid": os.getpid()})
        )  # Record has defaults for the rest
    after("torch", _begin)


def run_dir() -> Path | None:
    """Return where records go, None without a `surgery run` on this machine."""
    folder = os.environ.get(RUN_DIR)
    return Path(folder) if folder and Path(folder).is_dir() else None


def _begin() -> None:
    from .session import begin

    begin()
