"""The JSON file that each process of a run leaves for `surgery run`: what it trained, and what took effect.

A file `<pid>.json` in the folder that SURGERY_RUN_DIR names, whole or not there, written anew whenever there is more to
say. Every Python of the command leaves one when it starts.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class Record:
    """One process.

    Args:
        pid: its number.
        rank: its rank among the processes that train; 0 where there is one.
        has_torch: it has imported torch.
        has_loaded: a model's weights were loaded.
        has_trained: a backward pass or an optimizer's step was made.
        is_refused: a regularizer could not go on, whether or not that has ended the process.
        is_final: it was written at the end of the process, and not before one that nobody could tell of.
        acts: the regularizers that took effect.
        faults: why others did not, in sentences.
        refused: the regularizers that these tell of.
        unmatched: options whose glob matched nothing.
        notes: what else should be known.
        models: one entry of the report for each model that was patched or perturbed.
    """

    pid: int
    rank: int = 0
    has_torch: bool = False
    has_loaded: bool = False
    has_trained: bool = False
    is_refused: bool = False
    is_final: bool = False
    acts: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Replace the record of this process."""
        path = folder / f"{self.pid}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)))
        part.replace(path)


def read_records(folder: Path) -> list[Record]:
    """Return the records of all processes, in the order of their ranks."""
    found = (_read(path) for path in sorted(folder.glob("*.json")))
    return sorted((one for one in found if one is not None), key=lambda one: one.rank)


def _read(path: Path) -> Record | None:
    """Read a record; None if its process was killed while it wrote the first, or the disk is full."""
    try:
        document = json.loads(path.read_text())
    except ValueError:
        return None
    names = {one.name for one in fields(Record)}
    return Record(**{name: value for name, value in document.items() if name in names})
