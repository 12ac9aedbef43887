"""How many threads to use."""

import os


def default_workers() -> int:
    """Two threads per core, so that one computes while another waits for the disk or its turn; at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2 * cores, 16)
