"""SURGERY_RUN_DIR, the folder of the records: apart from them, as each Python of a command reads it when it starts."""

import os
from pathlib import Path

RUN_DIR = "SURGERY_RUN_DIR"
"""Set by `surgery run` alone: the folder that every process of the command leaves its record in."""


def run_dir() -> Path | None:
    """Return where records go, None without a `surgery run` on this machine."""
    folder = os.environ.get(RUN_DIR)
    return Path(folder) if folder and Path(folder).is_dir() else None
