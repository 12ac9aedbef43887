"""What a process says while it trains, on stderr."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from surgery.errors import some

from .order import Order

_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "LOCAL_RANK")


def say(text: str) -> None:
    """Print a line of this rank's."""
    sys.stderr.write(f"surgery: rank {find_rank()}: {text}\n")  # at once, for other ranks write as well
    sys.stderr.flush()


def told(order: Order, entry: Mapping[str, Any]) -> str:
    """Tell what was done to a model, from its entry of the report."""
    said = []
    if order.noisytune is not None:
        lam = f"lam {order.noisytune:g}, seed {order.seed or 0}"
        said.append(f"noise on {entry['perturbed']} of {entry['parameters']} parameters ({lam})")
    if order.mixout is not None:
        said.append(f"{entry['mixed']} weights mixed (p {order.mixout:g})")
    if order.rdrop is not None:
        said.append(f"R-Drop (alpha {order.rdrop:g})")
    if order.anchor is not None:
        said.append(f"anchor ({order.anchor:g})")
    new = f"; new: {some(entry['new'])}" if entry["new"] else ""
    return f"{entry['class']}: {', '.join(said)}{new}"


def find_rank() -> int:
    """Return the rank of this process, as torch or a launcher's environment has it; 0 where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(next((os.environ[name] for name in _RANKS if os.environ.get(name, "").isdigit()), 0))
