"""Two processes on gloo that run cases of a module of this folder between them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import clean_env
from filelock import FileLock

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
SCRIPTS = HELPERS.parent / "scripts"
Found = dict[str, dict[str, Any]]


def launch(folder: Path, names: list[str], *, module: str = "ranks") -> list[Found]:
    """Run cases of a module in two processes, and return what each has measured."""
    paths = [str(ROOT), str(HELPERS), str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    environment = clean_env(PYTHONPATH=os.pathsep.join(paths))
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    folder.mkdir()
    ranks = []
    try:
        for rank in ("0", "1"):
            command = [sys.executable, "-m", module, rank, str(folder), *names]
            with (folder / f"{rank}.log").open("w") as log:
                ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
        codes = [process.wait(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [0, 0], (folder / "0.log").read_text() + (folder / "1.log").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def launched(tmp_path_factory: pytest.TempPathFactory, module: str, names: list[str]) -> list[Found]:
    """What every case measured, by rank: launched once, also when pytest-xdist spreads the tests over processes."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / module
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            launch(shared, names, module=module)
    return [json.loads((shared / f"{rank}.json").read_text()) for rank in (0, 1)]


def measured(found: list[Found], name: str) -> list[dict[str, Any]]:
    """What both ranks have measured in a case."""
    assert [rank[name].get("error") for rank in found] == [None, None]
    return [rank[name] for rank in found]
