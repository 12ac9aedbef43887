"""A set over WeakIdKeyDictionary: keeps nothing alive, and takes nothing for what is dead and had its id."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary


class WeakSet:
    """A set by identity: what dies leaves it."""

    def __init__(self, things: Iterable[Any] = ()) -> None:
        self._things: Any = WeakIdKeyDictionary()
        self.add(things)

    def add(self, things: Iterable[Any]) -> None:
        for thing in things:
            self._things[thing] = True

    def remove(self, things: Iterable[Any]) -> None:
        for thing in things:
            self._things.pop(thing, None)

    def clear(self) -> None:
        self._things.clear()

    def move(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Follow what was replaced by others of their names."""
        moved = [name for name, thing in before.items() if thing in self._things and name in after]
        self.remove(before[name] for name in moved)
        self.add(after[name] for name in moved)

    def has_any(self, things: Iterable[Any]) -> bool:
        return any(thing in self._things for thing in things)

    def __contains__(self, thing: Any) -> bool:
        return thing in self._things

    def __len__(self) -> int:
        return len(self._things)
