"""`surgery run` inside the processes of a command: each starts here, and wakes when it imports torch."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from .inside.imports import after, expect

RUN_DIR = "SURGERY_RUN_DIR"
"""Set by `surgery run` alone: the folder that every process of the command leaves its record in."""
PRETRAINED = {"transformers.modeling_utils": "PreTrainedModel", "diffusers.models.modeling_utils": "ModelMixin"}
"""The classes that load pretrained weights, by the modules that have them."""


def start() -> None:
    """Leave word that this Python can be reached, and wait for torch. Every Python runs it: nothing heavy here."""
    after("torch", _begin)
    for module in PRETRAINED:  # which may be the first that imports torch
        expect(module)
    if folder := run_dir():
        with suppress(OSError):  # of a full disk, `surgery run` says what it knows
            _leave_word(folder / f"{os.getpid()}.json")


def _leave_word(path: Path) -> None:
    if path.exists():  # of this process before an exec, or of another one that is dead
        path.rename(path.with_stem(f"{path.stem}-{time.time_ns()}"))
    path.write_text(json.dumps({"pid": os.getpid()}))


def run_dir() -> Path | None:
    """Return where records go, None without a `surgery run` on this machine."""
    folder = os.environ.get(RUN_DIR)
    return Path(folder) if folder and Path(folder).is_dir() else None


def _begin() -> None:
    from .inside.process import begin

    begin()
