"""Rank and number of processes, as launchers write them into the environment; no torch, for `surgery run` asks too."""

import os

_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "LOCAL_RANK")
_SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def launched_rank() -> int:
    """Return the rank that a launcher gave this process, 0 where there is none."""
    return _first_number(_RANKS, 0)


def launched_size() -> int:
    """Return how many processes a launcher has started, 1 where there is none."""
    return _first_number(_SIZES, 1)


def _first_number(variables: tuple[str, ...], default: int) -> int:
    return int(next((os.environ[name] for name in variables if os.environ.get(name, "").isdigit()), default))
