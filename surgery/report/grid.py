"""Lay out a figure for each tensor in a grid of kinds of matrices by layers, exact also where several share a cell."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from surgery.escapes import printable
from surgery.inspect.name_patterns import depths, without_numbers
from surgery.report.widths import cut_end

_MOST_KINDS = 48
_LONGEST_KIND = 44


@dataclass(frozen=True)
class Mark:
    """What is written over a cell in place of a figure.

    Args:
        sign: one character.
        why: its meaning.
        is_alarm: whether it stands for the whole of a cell that one of its tensors has it.
    """

    sign: str
    why: str
    is_alarm: bool = False


@dataclass(frozen=True)
class Cell:
    """What to draw of a tensor, or of those that share a place.

    Args:
        size: elements.
        value: a figure that is the root of the mean of a square over them; None if there is none.
        mark: what is drawn in its place.
    """

    size: int
    value: float | None = None
    mark: Mark | None = None


@dataclass(frozen=True)
class Grid:
    """Cells by row and column.

    Args:
        kinds: labels of the rows: those in layers first, in order of appearance.
        layers: the columns; None, if there are tensors outside of layers, is the first.
        cells: those places at which there are tensors.
    """

    kinds: Sequence[str]
    layers: Sequence[int | None]
    cells: Mapping[tuple[int, int], Cell]


def lay_out(tensors: Mapping[str, Cell]) -> Grid:
    """Place every tensor, given by name; those that share a place, such as experts, get their root mean square."""
    layer_of = depths(tensors)
    kind_of = {name: without_numbers(name) for name in tensors}
    layered = dict.fromkeys(kind_of[name] for name, layer in layer_of.items() if layer is not None)
    kinds = [*layered, *dict.fromkeys(found for found in kind_of.values() if found not in layered)]
    rows = {found: min(row, _MOST_KINDS - 1) for row, found in enumerate(kinds)}
    layers = sorted(set(layer_of.values()), key=lambda layer: -1 if layer is None else layer)
    columns = {layer: column for column, layer in enumerate(layers)}
    places: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    for name, cell in tensors.items():
        places[rows[kind_of[name]], columns[layer_of[name]]].append(cell)
    return Grid(_labels(kinds, list(layered)), layers, {place: _merge(cells) for place, cells in places.items()})


def _merge(cells: Sequence[Cell]) -> Cell:
    """Put those that share a place together: one alarm is all's, and a figure is over the elements of all."""
    if len(cells) == 1:
        return cells[0]
    size = sum(cell.size for cell in cells)
    marks = [cell.mark for cell in cells if cell.mark]
    alarm = next((mark for mark in marks if mark.is_alarm), None)
    if alarm or len(marks) == len(cells):
        return Cell(size, mark=alarm or marks[0])
    counted = [(cell.size, cell.value) for cell in cells if cell.value is not None]
    n = sum(count for count, _ in counted)
    return Cell(size, math.sqrt(math.fsum(count * value * value for count, value in counted) / n) if n else 0.0)


def _labels(kinds: Sequence[str], layered: Sequence[str]) -> list[str]:
    """Shorten the kinds' names: by what all those in layers begin with, and to what can be read."""
    columns = zip(*(kind.split(".")[:-1] for kind in layered), strict=False)
    prefix = "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    named = [printable(kind.removeprefix(prefix) if kind in layered else kind) for kind in kinds]
    labels = [label if len(label) <= _LONGEST_KIND else "…" + cut_end(label, _LONGEST_KIND - 1) for label in named]
    if len(labels) > _MOST_KINDS:
        labels[_MOST_KINDS - 1 :] = [f"{len(labels) - _MOST_KINDS + 1} more kinds"]
    return labels
