"""What a trial ran with: versions, processor, GPUs, and the commit of the script's repository."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from surgery.threads import cores

_PACKAGES = ("model-surgery", "torch", "transformers", "accelerate", "datasets", "peft", "trl", "lightning", "numpy",
             "sentence-transformers", "safetensors", "tokenizers")  # fmt: skip


def describe_environment(words: Sequence[str], cwd: Path) -> dict[str, Any]:
    """Return what is known of where a command is submitted; on a cluster, its node's processor may be another.

    Args:
        words: the command, with {seed} and {out} in it.
        cwd: that it is run in.
    """
    return {
        "python": sys.version.split()[0],
        "versions": _versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "gpus": _gpus(),
        "script": _script_commit(tuple(words), cwd),
    }


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return [line.strip() for line in _output(query).splitlines() if line.strip()]


@cache
def _script_commit(words: tuple[str, ...], cwd: Path) -> dict[str, Any] | None:
    """Return the commit of the repository that a command's script lies in, and whether its files were edited since."""
    script = next((cwd / word for word in (*words[1:], words[0]) if (cwd / word).is_file()), None)
    if script is None or not (commit := _output(["git", "-C", str(script.parent), "rev-parse", "HEAD"]).strip()):
        return None
    edited = _output(["git", "-C", str(script.parent), "status", "--porcelain", "--untracked-files=no"])
    return {"file": str(script), "commit": commit, "is_edited": bool(edited.strip())}


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
