"""The number of threads by default, where a container's cgroups give it less time than it has cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery import threads


def _process(root: Path, version: int, path: str, *, mounted: str = "/") -> Path:
    """A process's folder in procfs, with a hierarchy of cgroups mounted in `root`."""
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,cpu,cpuacct"
    (root / "proc").mkdir()
    (root / "proc/cgroup").write_text(f"4:memory:/other\n{'0:' if version == 2 else '3:cpu,cpuacct'}:{path}\n")
    (root / "proc/mountinfo").write_text(
        f"31 23 0:28 / /proc rw - proc proc rw\n32 31 0:29 {mounted} {root}/cg rw - {kind}\n"
    )
    return root / "proc"


def _limit(folder: Path, version: int, quota: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} 100000\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{-1 if quota == 'max' else quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("own", "parent", "cores"),
    [("150000", "max", 2), ("max", "100000", 1), ("400000", "200000", 2), ("50000", "max", 1), ("max", "max", 8)],
)
def test_quotas_of_a_cgroup_and_its_parents_count(
    version: int, own: str, parent: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_PROC", _process(tmp_path, version, "/pods/one"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    _limit(tmp_path / "cg/pods/one", version, own)
    _limit(tmp_path / "cg/pods", version, parent)
    assert threads.cores() == cores


@pytest.mark.parametrize("version", [1, 2])
def test_hierarchy_mounted_from_within_counts(version: int, tmp_path: Path) -> None:
    """Docker without a namespace for cgroups mounts the container's own as the root."""
    proc = _process(tmp_path, version, "/docker/0123", mounted="/docker/0123")
    _limit(tmp_path / "cg", version, "250000")
    assert list(threads._quotas(proc)) == [2.5]


@pytest.mark.parametrize("text", ["", "max", "nonsense here\n", "0 0\n"])
def test_damaged_quotas_are_none(text: str, tmp_path: Path) -> None:
    proc = _process(tmp_path, 2, "/")
    (tmp_path / "cg").mkdir()
    (tmp_path / "cg/cpu.max").write_text(text)
    assert list(threads._quotas(proc)) == []
    assert list(threads._quotas(tmp_path / "nowhere")) == []


def test_quota_of_a_real_cgroup_counts() -> None:
    folder = Path("/sys/fs/cgroup/cpu/surgery-test")
    try:
        folder.mkdir()
        (folder / "cpu.cfs_quota_us").write_text("100000")
    except OSError:
        pytest.skip("no cgroup of the first version can be made here")
    code = "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
    code += "from surgery.threads import cores; print(cores())"
    try:
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    finally:
        folder.rmdir()
    assert done.stdout == "1\n"
