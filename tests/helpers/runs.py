"""Commands for `surgery run` that leave the record of a training, without one."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LEAVE = """
import os
from surgery.hooks.run.folder import run_dir
from surgery.hooks.run.record import Record
Record(os.getpid(), **{values!r}).write(run_dir())
"""
MODEL = {
    "class": "Bert",
    "parameters": 9,
    "perturbed": 0,
    "mixed": 4,
    "new": [],
    "w_pre_bytes": 16,
    "steps": 5,
    "rdrop_fired": 0,
    "kl": None,
    "ce": None,
    "distance": 0.5,
}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def training(*acts: str, then: str = "", **values: object) -> list[str]:
    """A command that says that it trained, and which regularizers acted."""
    record = {"has_torch": True, "has_trained": True, "is_final": True, "acts": list(acts), "models": [MODEL]} | values
    return python(_LEAVE.format(values=record) + then)


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
