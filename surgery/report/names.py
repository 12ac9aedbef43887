"""Shorten the names of a table's rows so that no two of them look alike: each keeps what tells it from the others."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count, pairwise
from os.path import commonprefix as common_beginning  # of characters
from pathlib import PurePosixPath
from typing import Any

from surgery.report.widths import cut, cut_end, shorten, width_of

_WORD = 16  # characters of a dotted part that are kept around what differs in it
_ROOM = 3  # columns: with fewer, nothing is told apart


def tell_apart(names: Iterable[str], width: int) -> dict[str, str]:
    """Return what to show of each name in so many columns; those that are still alike are numbered."""
    shown = _tell_apart(list(dict.fromkeys(names)), width)
    taken = {text for name, text in shown.items() if text == name}
    for name, text in shown.items():
        if text != name:
            numbered = (cut(text, width - len(mark)) + mark for mark in map("~{}".format, count(2)))
            shown[name] = text if text not in taken else next(other for other in numbered if other not in taken)
            taken.add(shown[name])
    return shown


def full_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of rows of tensors; where several files have the same, with the folder or else the file."""
    places = [(PurePosixPath(row["file"]).parent.as_posix(), row["name"]) for row in rows]
    if len({name for _, name in places}) == len(places):
        return [name for _, name in places]
    is_folder_enough = len(set(places)) == len(places)
    return [
        f"{folder if is_folder_enough else row['file']}/{name}".removeprefix("./")
        for row, (folder, name) in zip(rows, places, strict=True)
    ]


def least_width(names: Iterable[str], least: int, most: int) -> int:
    """Return in how few columns the names are told apart without numbers: `least` if in none up to `most`."""
    names = list(dict.fromkeys(names))
    widths = (*range(least, most, 4), most)
    return next((width for width in widths if len(set(_tell_apart(names, width).values())) == len(names)), least)


def _tell_apart(names: Sequence[str], width: int) -> dict[str, str]:
    """Cut the names; where that does not tell them apart, cut their words too, to what no other word begins with."""
    shown = _shorten_all(names, width)
    times = Counter(shown.values())
    if alike := {name for name, text in shown.items() if times[text] > 1}:
        initials = _initials({part for name in names for part in name.split(".")})
        brief = {name: ".".join(initials[part] for part in name.split(".")) for name in alike}
        cuts = _shorten_all(list(brief.values()), width)
        shown |= {name: cuts[text] for name, text in brief.items()}
    return shown


def _initials(words: Collection[str]) -> dict[str, str]:
    """Cut words down to the shortest beginnings that no others have."""
    ordered = sorted(words)
    shared = [len(common_beginning(pair)) for pair in pairwise(ordered)]  # noqa: RUF071
    lengths = zip(ordered, [0, *shared], [*shared, 0], strict=True)
    return {word: _begin(word, 1 + max(before, after)) for word, before, after in lengths}


def _begin(word: str, length: int) -> str:
    return word if len(word) <= length + 1 else word[:length] + "…"


def _shorten_all(names: Sequence[str], width: int) -> dict[str, str]:
    """Cut each name in the middle; those that come out alike keep that in which they differ."""
    shown = {name: shorten(name, width) for name in names}
    alike = defaultdict(list)
    for name, text in shown.items():
        alike[text].append(name)
    for group in alike.values():
        if len(group) > 1:
            shown |= _keep_differences(group, width)
    return shown


def _keep_differences(names: Sequence[str], width: int) -> dict[str, str]:
    """Show names of one beginning and one end by both, and by what each has between them."""
    begin = len(common_beginning(names))  # noqa: RUF071
    end = len(common_beginning([name[begin:][::-1] for name in names]))  # noqa: RUF071
    first = names[0]
    begin = _back_to_dot(first[:begin])
    end = _back_to_dot(first[len(first) - end :][::-1])
    edge = max(width // 6, 1)
    room = width - 2 * (edge + 1)
    if room < _ROOM:
        return {name: shorten(name, width) for name in names}
    middles = {name: name[begin : len(name) - end] for name in names}
    inner = _shorten_all(list(dict.fromkeys(middles.values())), room)
    spare = width - 2 - max(width_of(text) for text in inner.values())
    head = cut(first[:begin], spare // 2)
    tail = cut_end(first[len(first) - end :], spare - width_of(head))
    return {name: f"{head}…{inner[middle]}…{tail}" for name, middle in middles.items()}


def _back_to_dot(text: str) -> int:
    """Return how much of a text comes before the dotted part that it ends in, if that is a word."""
    dot = text.rfind(".") + 1
    return dot if len(text) - dot <= _WORD else len(text)
