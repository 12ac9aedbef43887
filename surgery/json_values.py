"""Values of a JSON document that may be damaged or hostile, each of the type that it should be, or a TypeError."""

from typing import Any, TypeVar

_Kind = TypeVar("_Kind")


def typed(value: Any, kind: type[_Kind]) -> _Kind:
    """Return a value of a JSON document if it is of that type; True and False are no numbers."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError
    return value


def as_float(value: Any) -> float:
    """Return a number as float."""
    return float(value) if type(value) is int else typed(value, float)


def optional(value: Any, kind: type[_Kind]) -> _Kind | None:
    """Return a value of that type, or None."""
    return None if value is None else typed(value, kind)


def all_typed(values: Any, kind: type[_Kind]) -> tuple[_Kind, ...]:
    """Return the items of a list, all of that type."""
    return tuple(typed(value, kind) for value in typed(values, list))


def texts(entry: Any) -> dict[str, str]:
    """Return an object whose values are texts."""
    return {name: typed(value, str) for name, value in typed(entry, dict).items()}


def to_hex(value: float | None) -> str | None:
    """Write a float to the bit."""
    return None if value is None else value.hex()


def from_hex(value: str | None) -> float | None:
    """Read what `to_hex` wrote."""
    return None if value is None else float.fromhex(value)
