"""How many threads to use: by the cores of this process, and by whether the work waits for the disk."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

THREADS_PER_CORE = 3
"""Of those that stream: one computes while others wait for the disk or their turn."""
_MOST = 16
_PROC = Path("/proc/self")


def streaming_workers() -> int:
    """Three threads per core, at most 16."""
    return min(THREADS_PER_CORE * cores(), _MOST)


def computing_workers() -> int:
    """One thread per core, for work that does not wait; at most 16."""
    return min(cores(), _MOST)


def cores() -> int:
    """Count the cores that this process may run on, and no more than its cgroups give it the time of."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        cores = os.process_cpu_count() or 1
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(_PROC))]))


def _quotas(proc: Path) -> Iterator[float]:
    """Yield the CPU quotas of this process's cgroups and of those they are in, in cores; containers set them.

    Args:
        proc: the folder of a process in procfs.
    """
    for folder, mount in _cgroups(proc):
        for each in (folder, *folder.parents):
            if each == mount or each.is_relative_to(mount):
                yield from _quota(each)


def _cgroups(proc: Path) -> Iterator[tuple[Path, Path]]:
    """Yield where the cgroups of a process that limit its CPU time are, and where their hierarchy is mounted."""
    try:
        memberships = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.partition(" - ") for line in (proc / "mountinfo").read_text().splitlines()]
    except (OSError, ValueError):
        return
    groups = {name: path for _, names, path in memberships for name in names.split(",")}
    for place, _, kind in mounts:
        root, mount = place.split()[3:5]
        words = kind.split()
        name = {"cgroup2": "", "cgroup": "cpu"}.get(words[0])
        if name in groups and (name == "" or "cpu" in words[-1].split(",")):
            path = PurePosixPath(groups[name])
            inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
            yield Path(mount) / inside, Path(mount)


def _quota(folder: Path) -> Iterator[float]:
    """Yield the quota of a cgroup of either version, if it has one."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota != "max" and int(quota) > 0 and int(period) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError):
            continue
