"""Calls of the C library that fail in a process under test, by a library in LD_PRELOAD that a C compiler makes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = (
    *("open", "create", "read", "write", "fsync", "truncate", "fallocate", "stat", "statvfs", "readlink", "mkdir"),
    *("unlink", "rename", "list", "close", "map", "flock"),
)


def build(folder: Path) -> Path:
    """Compile the library; skip the test where it cannot be."""
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("calls are made to fail by a library for Linux, which takes a C compiler")
    library = folder / "faults.so"
    source = Path(__file__).with_suffix(".c")
    done = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot compile here: {done.stderr.decode().strip()[-200:]}")
    return library


def failing(
    library: Path, call: str, code: int, below: Path, *, nth: int = 0, hit: Path | None = None
) -> dict[str, str]:
    """Return the environment of a process whose nth such call fails, on files below a folder; 0: all of them."""
    environment = {"LD_PRELOAD": str(library), "FAULT_CALL": call, "FAULT_ERRNO": str(code), "FAULT_NTH": str(nth)}
    environment["FAULT_BELOW"] = str(below)
    return environment | ({"FAULT_HIT": str(hit)} if hit else {})
