"""The pieces of all reports: labelled lines, names grouped by reason, sizes, JSON."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.errors import by_reason, some
from surgery.exit_codes import JSON_VERSION

VALUE_AT = 15
"""Column at which the values of labelled lines begin."""


def as_json(rows: Mapping[str, Any]) -> str:
    """Return rows as JSON in ASCII, for programs, with the version of their shape; NaN and Inf are null."""
    document = {"version": JSON_VERSION, **rows}
    try:
        return json.dumps(document, indent=1, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(document), indent=1)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return finite(value) if isinstance(value, float) else value


def finite(value: float | None) -> float | None:
    """Return a figure that JSON can hold: NaN and Inf are none."""
    return value if value is not None and math.isfinite(value) else None


def line(label: str, value: str) -> str:
    """Lay out one labelled value."""
    return f"  {label:<{VALUE_AT - 3}} {value}"


def reason_lines(label: str, reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Lay out names that each come with a reason: a line for each reason."""
    return [line(label, f"{len(names)} ({some(names)}): {reason}") for reason, names in by_reason(reasons).items()]


def as_bytes(n: int) -> str:
    """Return a size in kB, MB or GB."""
    if n < 1e6:
        return f"{n / 1e3:.1f} kB"
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
