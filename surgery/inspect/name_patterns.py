"""Group tensor names that differ only in numbers (`layers.{0..21}.mlp.up_proj.weight`), and find each one's layer.

A number is a whole dotted part of a name: `h.0`, `experts.7`; not `w1` or `conv2d_3`, which tell kinds of tensors
apart.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")
_Item = TypeVar("_Item")
_Numbers = tuple[int, ...]
_Template = tuple[str, ...]  # what stands around the numbers of a name: one part more than there are numbers


@dataclass(frozen=True)
class Group(Generic[_Item]):
    """Items whose names follow one pattern, with every combination of its numbers present.

    Args:
        pattern: the name, with the numbers that vary in braces: `{0..21}`, `{0..3,5}`, `{1..47..2}` for every second.
        members: in the order of their numbers.
        depths: of each member, see `depths`.
    """

    pattern: str
    members: tuple[_Item, ...]
    depths: tuple[int | None, ...]


def group(
    items: Iterable[_Item], *, name: Callable[[_Item], str], kind: Callable[[_Item], Hashable]
) -> list[Group[_Item]]:
    """Group items by the pattern of their names, in the order in which the first of each group comes.

    Args:
        name: an item's name.
        kind: what else the members of a group have in common, such as dtype and shape.
    """
    items = list(items)
    depth = depths(map(name, items))
    order: dict[tuple[_Template, Hashable, _Numbers], list[tuple[int, _Item]]] = defaultdict(list)
    families: dict[tuple[_Template, Hashable], set[_Numbers]] = defaultdict(set)
    for place, item in enumerate(items):
        template, numbers = _split(name(item))
        order[template, kind(item), numbers].append((place, item))
        families[template, kind(item)].add(numbers)
    found = []
    for (template, what), members in families.items():
        for axes in _factor(members):
            placed = [entry for numbers in _product(axes) for entry in order[template, what, numbers]]
            inside = tuple(item for _, item in placed)
            pattern = _fill(template, [as_braces(axis) for axis in axes])
            found.append((min(place for place, _ in placed), pattern, inside))
    found.sort(key=lambda entry: entry[0])
    return [Group(pattern, inside, tuple(depth[name(item)] for item in inside)) for _, pattern, inside in found]


def depths(names: Iterable[str]) -> dict[str, int | None]:
    """Return how deep in the model each tensor lies: the first number of its name that varies from name to name.

    In `0.encoder.layer.3.weight` that is 3, if all names begin with `0`. None where no number varies.
    """
    split = {name: _split(name) for name in names}
    seen: dict[_Template, set[int]] = defaultdict(set)
    for template, numbers in split.values():
        for place, number in enumerate(numbers, 1):
            seen[template[:place]].add(number)
    return {
        name: next((n for place, n in enumerate(numbers, 1) if len(seen[template[:place]]) > 1), None)
        for name, (template, numbers) in split.items()
    }


def as_braces(numbers: Sequence[int]) -> str:
    """Write sorted numbers as a shell would expand them: `4`, `{0..21}`, `{0..3,5}`, `{1..47..2}`."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return str(first)
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) == 1 and len(numbers) > 2:
        (step,) = steps
        return f"{{{first}..{last}}}" if step == 1 else f"{{{first}..{last}..{step}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def without_numbers(name: str) -> str:
    """Return a name with `*` for each of its numbers: what tensors of all layers and experts have in common."""
    return _NUMBER.sub("*", name)


def _split(name: str) -> tuple[_Template, _Numbers]:
    """Take a name's numbers out of it: `h.0.w` is ("h.", ".w") and (0,)."""
    return tuple(_NUMBER.split(name)), tuple(int(number) for number in _NUMBER.findall(name))


def _fill(template: _Template, parts: Sequence[str]) -> str:
    return "".join(text for pair in zip(template, [*parts, ""], strict=True) for text in pair)


def _factor(members: set[_Numbers]) -> list[list[list[int]]]:
    """Cut a set of tuples of equal length into products of sorted axes."""
    if members == {()}:
        return [[]]
    firsts: dict[_Numbers, set[int]] = defaultdict(set)
    for numbers in members:
        firsts[numbers[1:]].add(numbers[0])
    tails: dict[frozenset[int], set[_Numbers]] = defaultdict(set)
    for tail, heads in firsts.items():
        tails[frozenset(heads)].add(tail)
    return [[sorted(heads), *rest] for heads, those in tails.items() for rest in _factor(those)]


def _product(axes: Sequence[Sequence[int]]) -> list[_Numbers]:
    products: list[_Numbers] = [()]
    for axis in axes:
        products = [(*numbers, n) for numbers in products for n in axis]
    return products
