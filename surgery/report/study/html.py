"""HTML of names, commands and logs that are other people's: each is escaped for a terminal, and then for HTML."""

import html
from collections.abc import Iterable, Sequence

from surgery.escapes import printable


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Escape a text for a terminal and for HTML, unless it is HTML already."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(printable(text)))


def tag(name: str, *children: str, **attributes: str | bool | None) -> Html:
    """Return an element. A trailing _ of an attribute is left out, any other is a -; those that are None too."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[str], between: str = "") -> Html:
    """Join texts and elements."""
    return Html(between.join(map(escape, children)))


def items(pairs: Iterable[tuple[str, str]]) -> Html:
    """Return a list of terms, each with what it is; those that are nothing are left out."""
    return tag("dl", *(join((tag("dt", term), tag("dd", value))) for term, value in pairs if value))


def table(head: Sequence[str], body: Iterable[Sequence[str]], *, label: str, numbers: Iterable[int] = ()) -> Html:
    """Return a table that scrolls in a box of its own where it is too wide.

    Args:
        head: titles of the columns; the first of each row names it.
        label: what it is of, for who does not see it.
        numbers: columns that are aligned to the right.
    """
    right = set(numbers)

    def cell(name: str, i: int, text: str, scope: str | None = None) -> Html:
        return tag(name, text, scope=scope, class_="number" if i in right else None)

    rows = [
        tag("tr", *(cell("td" if i else "th", i, text, None if i else "row") for i, text in enumerate(row)))
        for row in body
    ]
    titles = tag("tr", *(cell("th", i, text, "col") for i, text in enumerate(head)))
    inner = tag("table", tag("thead", titles), tag("tbody", *rows), aria_label=label)
    return tag("div", inner, class_="box", tabindex="0", role="region", aria_label=label)
