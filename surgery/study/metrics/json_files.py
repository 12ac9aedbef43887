"""Metrics in JSON: all_results.json and its like, and the log of transformers' Trainer in trainer_state.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.files import read_file
from surgery.study.metrics.found import as_number

RESULTS = ("all_results.json", "eval_results.json", "*results*.json", "*metrics*.json")
TRAINER_STATE = "trainer_state.json"
_DEEPEST = 8


def read_results(path: Path) -> dict[str, float]:
    """Return the numbers of a JSON object, those of nested ones as `outer.inner`; {} for anything else."""
    return dict(_numbers(_load(path), "", _DEEPEST))


def _numbers(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping) and depth:
        for name, item in value.items():
            yield from _numbers(item, f"{prefix}.{name}" if prefix else str(name), depth - 1)
    elif prefix and not isinstance(value, str) and (number := as_number(value)) is not None:
        yield prefix, number


def read_log_history(path: Path) -> tuple[int, dict[str, list[float]]]:
    """Return how many steps a trainer_state.json has seen, and every figure that it logged, oldest first."""
    state = _load(path)
    if not isinstance(state, Mapping):
        return 0, {}
    logged: dict[str, list[float]] = {}
    rows = state.get("log_history")
    for row in rows if isinstance(rows, list) else ():
        for name, value in read_row(row).items():
            logged.setdefault(name, []).append(value)
    steps = as_number(state.get("global_step"))
    return int(steps) if steps is not None and abs(steps) < 2**63 else 0, logged


def read_row(row: Any) -> dict[str, float]:
    """Return the numbers of one row of a log."""
    if not isinstance(row, Mapping):
        return {}
    found = {str(name): as_number(value) for name, value in row.items() if not isinstance(value, str)}
    return {name: value for name, value in found.items() if value is not None}


def _load(path: Path) -> Any:
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):  # it is another program's, and may be anything
        return None
