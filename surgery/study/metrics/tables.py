"""Metrics in CSV: Lightning's metrics.csv, and the files that sentence-transformers' evaluators write."""

import csv
from pathlib import Path

from surgery.study.metrics.found import as_number

FILES = ("metrics.csv", "*results*.csv")


def read_columns(path: Path) -> dict[str, list[float]]:
    """Return the numbers of each column, from the top; a cell without one is left out."""
    columns: dict[str, list[float]] = {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                for name, cell in row.items():
                    if name and isinstance(cell, str) and (value := as_number(cell)) is not None:
                        columns.setdefault(name, []).append(value)
    except (OSError, csv.Error):
        return {}
    return columns
