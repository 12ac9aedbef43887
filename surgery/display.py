"""Show results in Python: a repr of one bounded line, and HTML of one short table for notebooks.

A recipe of a large model has tens of thousands of records, and a notebook keeps all that a cell shows. The names in
it are their author's, and may hold markup.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from math import isnan
from typing import Any, TypeVar

from surgery.escapes import printable

_ITEMS = 4  # of a collection that is written out
_BYTES = 32
_TEXT = 120  # characters
_LINE = 1000
_HTML = 200
_ROWS = 20
_NESTED = 1  # results within a result whose fields are written out
_NO_MATH = "tex2jax_ignore mathjax_ignore"  # else a notebook typesets what stands between two $
_LEFT = ' style="text-align:left"'  # notebooks set cells to the right
_Item = TypeVar("_Item")


class Brief:
    """Base of a result, made with `@dataclass(repr=False)`: its repr stays one line of at most 1,000 characters."""

    __slots__ = ()

    def __repr__(self) -> str:
        return _cut(_fields(self, 0), _LINE)


def as_html(
    lines: Iterable[str], columns: Sequence[str], items: Sequence[_Item], cells: Callable[[_Item], Sequence[str]]
) -> str:
    """Lay out a result for a notebook: lines, then a table of the first 20 items, then how many more there are.

    Args:
        lines: above the table.
        columns: titles; the first and the last column are of words, those between them of figures.
        items: the most important first.
        cells: of an item, one for each column.
    """
    shown = list(lines)
    shown[_ROWS:] = [f"and {len(shown) - _ROWS:,} more"] * (len(shown) > _ROWS)
    above = f"<p>{'<br>'.join(map(_escaped, shown))}</p>" if shown else ""
    rows = [_row("th", columns), *(_row("td", cells(item)) for item in items[:_ROWS])]
    table = f"<table>{''.join(rows)}</table>" if items else ""
    more = f"<p>and {len(items) - _ROWS:,} more</p>" if len(items) > _ROWS else ""
    return f'<div class="{_NO_MATH}">{above}{table}{more}</div>'


def as_shape(shape: Sequence[int]) -> str:
    """Write a shape: 5632 x 2048."""
    return " x ".join(map(str, shape)) or "scalar"


def at_commit(source: str, commit: str | None) -> str:
    """Write where a checkpoint is from: a path, or org/name@1234."""
    return f"{source}@{commit[:12]}" if commit else source


def number(value: float | None) -> str:
    """Write a figure with four digits."""
    return "-" if value is None or isnan(value) else f"{value:.4g}"


def _row(tag: str, cells: Sequence[str]) -> str:
    styles = [_LEFT, *[""] * (len(cells) - 2), _LEFT]
    parts = (f"<{tag}{style}>{_escaped(text)}</{tag}>" for style, text in zip(styles, cells, strict=False))
    return f"<tr>{''.join(parts)}</tr>"


def _escaped(text: str) -> str:
    """Make one line of text HTML; a long one loses its middle, where names differ least."""
    text = printable(text)
    half = _HTML // 2
    return escape(text if len(text) <= _HTML else f"{text[: half - 1]}…{text[-half:]}")


def _fields(value: Any, depth: int) -> str:
    shown = (f"{one.name}={_brief(getattr(value, one.name), depth)}" for one in fields(value) if one.repr)
    return f"{type(value).__name__}({', '.join(shown)})"


def _brief(value: Any, depth: int) -> str:
    """Write a value at some depth within the result that is shown."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _TEXT else f"{value[:_TEXT]!r}..."
    if isinstance(value, bytes) and len(value) > _BYTES:
        return f"<{len(value):,} bytes>"
    if isinstance(value, Mapping | tuple | list | set | frozenset):
        return _collection(value, depth)
    if is_dataclass(value):
        return _fields(value, depth + 1) if depth < _NESTED else f"{type(value).__name__}(...)"
    return _cut(repr(value), _TEXT)


def _collection(values: Collection[Any], depth: int) -> str:
    if len(values) > _ITEMS:
        kinds = {type(value).__name__ for value in values}
        return f"<{len(values):,} {kinds.pop() if len(kinds) == 1 else 'items'}>"
    if isinstance(values, Mapping):
        return f"{{{', '.join(f'{_brief(key, depth)}: {_brief(value, depth)}' for key, value in values.items())}}}"
    parts = ", ".join(_brief(value, depth) for value in values)
    if isinstance(values, tuple):
        return f"({parts},)" if len(values) == 1 else f"({parts})"
    return f"[{parts}]" if isinstance(values, list) else f"{{{parts}}}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
