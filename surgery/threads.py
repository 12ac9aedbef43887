"""How many threads to use: by the cores of this process, and by whether the work waits for the disk."""

import os

_MOST = 16


def streaming_workers() -> int:
    """Three threads per core, so that one computes while others wait for the disk or their turn; at most 16."""
    return min(3 * cores(), _MOST)


def computing_workers() -> int:
    """One thread per core, for work that does not wait; at most 16."""
    return min(cores(), _MOST)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
