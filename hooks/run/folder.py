"""SURGERY_RUN_DIR, the folder that records are left in; a file of its own, for every Python of a command imports it."""

import os
from pathlib import Path

RUN_DIR = "SURGERY_RUN_DIR"
"""Set by `surgery run` alone: the folder that every process of the command leaves its record in."""


def run_dir() -> Path | None:
    """Return where records go, None without a `surgery run` on this machine."""
    folder = os.environ.get(RUN_DIR)
    return Path(folder) if folder and Path(folder).is_dir() else None
