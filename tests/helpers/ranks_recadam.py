"""Two processes that train one model under RecAdam, beside one process with all the rows.

Run as `python -m ranks_recadam RANK FOLDER CASE...`; what each case measured is left in FOLDER as JSON.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks import build, compare, main, shard
from torch.nn.parallel import DistributedDataParallel

from surgery import RecAdam, describe, patch_model, stats, unpatch_model

SETTINGS = RecAdam(gamma=20.0, k=1.0, t0=2)


def case(wrap: Callable[[Any], Any], *, is_first: bool) -> Any:
    """Train for STEPS steps, of which the first are recalled almost wholly and the last hardly."""
    reference, model = patch_model(build(), recadam=SETTINGS), build()
    if is_first:
        patch_model(model, recadam=SETTINGS)
    wrapped = wrap(model)
    if not is_first:
        patch_model(wrapped, recadam=SETTINGS)
    found = compare(wrapped, reference, inner=model)
    got, wanted = stats(wrapped), stats(reference)
    return found | {
        "distance": abs(got["distance"] - wanted["distance"]) / wanted["distance"],
        "t": [got["recadam_t"], wanted["recadam_t"]],
        "share": got["w_pre_bytes"] / wanted["w_pre_bytes"],
        "recalled": describe(wrapped).recalled,
        "plain": _is_plain(unpatch_model(wrapped)),
    }


def _is_plain(model: torch.nn.Module) -> bool:
    return not any(name.startswith("_surgery") for module in model.modules() for name in vars(module))


CASES: dict[str, Callable[[], Any]] = {
    "ddp before": lambda: case(DistributedDataParallel, is_first=True),
    "ddp after": lambda: case(DistributedDataParallel, is_first=False),
    "fsdp before": lambda: case(shard, is_first=True),
    "fsdp after": lambda: case(shard, is_first=False),
}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], CASES)
