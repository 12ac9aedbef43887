"""How many columns of a terminal a text takes, and texts cut to a number of columns: wide characters take two."""

import unicodedata


def width_of(text: str) -> int:
    """Return how many columns a printable text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """Return as much of a text's beginning as fits."""
    if text.isascii():
        return text[: max(width, 0)]
    taken = 0
    for place, character in enumerate(text):
        taken += _width(character)
        if taken > width:
            return text[:place]
    return text


def cut_end(text: str, width: int) -> str:
    """Return as much of a text's end as fits."""
    if text.isascii():
        return text[max(len(text) - max(width, 0), 0) :]
    taken = 0
    for place in range(len(text) - 1, -1, -1):
        taken += _width(text[place])
        if taken > width:
            return text[place + 1 :]
    return text


def shorten(text: str, width: int) -> str:
    """Cut a text in the middle, where names differ least."""
    if width_of(text) <= width:
        return text
    head = cut(text, (width - 1) // 2)
    return f"{head}…{cut_end(text, width - 1 - width_of(head))}"
