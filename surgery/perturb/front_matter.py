"""The few text fields of a model card's YAML that another card takes over, read from the parser's events.

Nothing is constructed: merge keys and aliases of a hostile card grow without bound, and its tags and numbers fail in
every way there is.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import yaml

from surgery.files import open_file

Text = str | list[str]

_FRONT_MATTER = re.compile(rb"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)  # as the Hub finds it
_BEGIN = re.compile(rb"\s*---\r?\n")
_MOST_BYTES = 1 << 20  # some cards bring a thousand results along, which are less than this
_MOST_DEPTH = 50
_MOST_TEXT = 2000
_STR = "tag:yaml.org,2002:str"


def read_fields(card: Path, wanted: Collection[str]) -> dict[str, Text]:
    """Return those of the wanted fields of a card's metadata that hold text, or several texts.

    Raises:
        OSError: it cannot be read.
        ValueError, yaml.YAMLError: its metadata is damaged, too long or more than plain YAML.
    """
    with open_file(card) as file:
        head = file.read(_MOST_BYTES).removeprefix(b"\xef\xbb\xbf")
    found = _FRONT_MATTER.match(head)
    if not found:
        if len(head) >= _MOST_BYTES and _BEGIN.match(head):
            raise ValueError("too long")
        return {}
    return dict(_fields(_plain_events(found[1].decode("utf-8")), wanted))


def read_library(card: Path) -> str | None:
    """Return the library that a card names, if there is a card that names one."""
    try:
        found = read_fields(card, ("library_name",)).get("library_name")
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def _plain_events(text: str) -> Iterator[yaml.Event]:
    """Yield the events of plain YAML, in C where that can be, and refuse what is more."""
    depth = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH:
            raise ValueError("too deep")
        if getattr(event, "tag", None) not in (None, "!", _STR):
            raise ValueError("a tag")
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and not event.style:
            raise ValueError("a merge key")
        yield event


def _fields(events: Iterator[yaml.Event], wanted: Collection[str]) -> Iterator[tuple[str, Text]]:
    """Yield the wanted fields of the mapping at the top."""
    resolver = yaml.SafeLoader("")
    events = (event for event in events if not isinstance(event, yaml.StreamStartEvent | yaml.DocumentStartEvent))
    first = next(events)
    if isinstance(first, yaml.StreamEndEvent) or (isinstance(first, yaml.ScalarEvent) and not first.value):
        return  # empty
    if not isinstance(first, yaml.MappingStartEvent):
        raise ValueError("no mapping")
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            break
        key = str(event.value) if isinstance(event, yaml.ScalarEvent) else ""
        _skip(event, events)
        value = _text(next(events), events, resolver)
        if key in wanted and value:
            yield key, value
    for _ in events:  # to its end, so that damage there is damage
        pass


def _text(event: yaml.Event, events: Iterator[yaml.Event], resolver: yaml.SafeLoader) -> Text | None:
    """Return a value if it is text, or a list of texts; take its events in any case."""
    if not isinstance(event, yaml.SequenceStartEvent):
        _skip(event, events)
        return _scalar(event, resolver)
    texts: list[str | None] = []
    for item in events:
        if isinstance(item, yaml.SequenceEndEvent):
            break
        _skip(item, events)
        texts.append(_scalar(item, resolver))
    known = [text for text in texts if text is not None]
    return known if len(known) == len(texts) else None


def _scalar(event: yaml.Event, resolver: yaml.SafeLoader) -> str | None:
    """Return a scalar that is text: neither a number, a date, a bool nor nothing."""
    if not isinstance(event, yaml.ScalarEvent) or len(event.value) > _MOST_TEXT:
        return None
    value = str(event.value)
    is_text = bool(event.style) or event.tag is not None
    return value if is_text or resolver.resolve(yaml.ScalarNode, value, (True, False)) == _STR else None


def _skip(event: yaml.Event, events: Iterator[yaml.Event]) -> None:
    """Take the events of what begins with this one."""
    depth = int(isinstance(event, yaml.CollectionStartEvent))
    while depth:
        event = next(events)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
