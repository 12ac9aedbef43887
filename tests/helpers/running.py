"""Run a training script, unmodified, in a process of its own that is regularized from outside."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import clean_env

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parents[1] / "scripts"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--log-dir")


@dataclass(frozen=True)
class Run:
    """What a command did, and what its processes have left word of.

    Args:
        folder: it ran there.
        ranks: of the processes that trained something, each with its `models`.
        records: of all.
    """

    folder: Path
    code: int
    out: str
    err: str
    ranks: list[dict[str, Any]]
    records: list[dict[str, Any]]

    @property
    def models(self) -> list[dict[str, Any]]:
        return [model for rank in self.ranks for model in rank["models"]]


def run(
    folder: Path,
    script: str,
    *flags: str,
    args: Sequence[object] = (),
    launcher: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> Run:
    """Run a script as `surgery run FLAGS -- python LAUNCHER SCRIPT ARGS` does.

    Args:
        folder: for the script's files; it is run there.
        script: the name of one in tests/scripts, or the text of one.
        flags: none: the script is run as it is.
    """
    path = SCRIPTS / script
    if not script.endswith(".py"):
        path = folder / "script.py"
        path.write_text(script)
    records = folder / f"records-{len(list(folder.glob('records-*')))}"
    records.mkdir()
    path_of_ours = f"{ROOT / 'hooks' / 'site'}{os.pathsep}{ROOT}"
    ours = _variables(flags) | {"SURGERY_RUN_DIR": str(records), "PYTHONPATH": path_of_ours} if flags else {}
    quiet = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": "", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *launcher, *([str(folder / "log")] if "--log-dir" in launcher else []), path, *map(str, args)],
        env=clean_env(HF_HOME=str(folder / "hf-home"), **quiet, **ours, **(env or {})),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    left = [json.loads(file.read_text()) for file in records.glob("*.json")]
    left.sort(key=lambda record: record.get("rank", 0))
    ranks = [{"rank": record["rank"], "models": record["models"]} for record in left if record.get("models")]
    return Run(folder, done.returncode, done.stdout, done.stderr, ranks, left)


def _variables(flags: Sequence[str]) -> dict[str, str]:
    given: dict[str, list[str]] = {}
    rest = iter(flags)
    for flag in rest:
        value = "1" if flag in ("--allow-inactive", "--debug") else next(rest)
        given.setdefault(f"SURGERY_{flag.removeprefix('--').replace('-', '_').upper()}", []).append(value)
    return {name: shlex.join(values) if len(values) > 1 else values[0] for name, values in given.items()}
