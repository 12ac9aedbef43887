"""Seeded mutations of bytes and of JSON documents, the same for every kind of file; a case is its number."""

import copy
import json
from collections.abc import ItemsView, Iterator, Sequence
from random import Random
from typing import Any

_NUMBERS = (-1, 0, 1, 2, 2**31, 2**32, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**4000)
_FLOATS = (1.0, -0.0, 0.5, 1e308, float("nan"), float("inf"))
_TEXTS = (
    "",
    "1",
    "\0",
    "\ud800",
    "\udc80",
    "é日本",
    "\x1b[31m\n",
    "x" * 300,
    "x" * 5000,
    "../x",
    "/x",
    ".",
    "F32",
    "Q9",
)
_NESTS = ([], {}, [1], [[]], {"": ""}, [0, 4], [4, 0], [-4, 0], [0.0, 4.0], [True, False], {"a": 1}, ["a"])
ODD: tuple[Any, ...] = (None, True, False, *_NUMBERS, *_FLOATS, *_TEXTS, *_NESTS)
"""Values of JSON that are seldom where they belong."""

JSON_TOKENS = (
    *b'"{}[],:0-. \t\n\0\xff\xc3',
    b"\\u0000",
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"NaN",
    b"1e5",
    b"//",
    b"[" * 2000,
)


class _Twice(dict[str, Any]):
    """A dict that json.dumps writes with one of its names twice."""

    def items(self) -> ItemsView[str, Any]:
        items = list(super().items())
        return items + items[:1]  # type: ignore[return-value]


def mutate_bytes(r: Random, data: bytes, tokens: Sequence[bytes | int] = (0, 255), most: int = 4) -> bytes:
    """Change a few places: bits, bytes, runs taken out, put in or repeated, and the end."""
    mutated = bytearray(data)
    for _ in range(r.randint(1, most)):
        at = r.randrange(len(mutated) + 1)
        run = at + r.choice((1, 1, 2, 4, 8, 30))
        match r.randrange(7):
            case 0:
                mutated[at : at + 1] = bytes(byte ^ 1 << r.randrange(8) for byte in mutated[at : at + 1])
            case 1:
                mutated[at : at + 1] = bytes([r.randrange(256)])
            case 2:
                del mutated[at:run]
            case 3:
                token = r.choice(tokens)
                mutated[at:at] = token if isinstance(token, bytes) else bytes([token])
            case 4:
                mutated[at:at] = mutated[at:run]
            case 5:
                mutated[at:run] = r.choice((b"\0", b"\xff", b"\x7f")) * len(mutated[at:run])
            case 6 if r.random() < 0.3:
                del mutated[at:]
    return bytes(mutated)


def mutate_json(r: Random, document: Any) -> Any:
    """Return a JSON document with one to three values replaced, taken out, repeated, renamed or moved."""
    document = copy.deepcopy(document)
    for _ in range(r.randint(1, 3)):
        places = list(_places(document))
        if not places:
            return copy.deepcopy(r.choice(ODD))
        _change(r, *r.choice(places), places)
    return _Twice(document) if isinstance(document, dict) and r.random() < 0.05 else document


def spell_json(r: Random, document: Any) -> bytes:
    """Write a JSON document in one of its spellings, and rarely with bytes mutated."""
    separators = r.choice(((",", ":"), (", ", ": ")))
    text = json.dumps(document, ensure_ascii=r.random() < 0.5, separators=separators)
    data = text.encode("utf-8", "surrogatepass")
    if r.random() < 0.04:
        data = text.encode(r.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le")), "surrogatepass")
    if r.random() < 0.02:
        deep = r.choice((10, 100, 1000, 50_000))
        data = data.replace(b"]", b"[" * deep + b"]" * deep + b"]", 1)
    return mutate_bytes(r, data, JSON_TOKENS) if r.random() < 0.15 else data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container of a document with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _change(r: Random, holder: Any, key: Any, places: Sequence[tuple[Any, Any]]) -> None:
    value = holder[key]
    match r.randrange(8):
        case 0:
            del holder[key]
        case 1:
            other, at = r.choice(places)
            holder[key] = copy.deepcopy(other.get(at) if isinstance(other, dict) else (other[at : at + 1] or [None])[0])
        case 2 if isinstance(holder, dict):
            holder[r.choice([text for text in ODD if isinstance(text, str)] + [key + "'"])] = copy.deepcopy(value)
        case 2:
            holder.insert(key, copy.deepcopy(value))
        case 3 if isinstance(value, dict):
            holder[key] = _Twice(value)
        case 4 | 5 if type(value) is int:
            holder[key] = r.choice((value + 1, value - 1, -value, value * 2, value + 4, value + 2**32, value + 2**64))
        case 4 if isinstance(value, str) and value:
            at = r.randrange(len(value))
            holder[key] = (
                value[:at] + r.choice(("", "/", "\0", "é", "\n", "\ud800", "x" * 300, value)) + value[at + 1 :]
            )
        case _:
            holder[key] = copy.deepcopy(r.choice(ODD))
