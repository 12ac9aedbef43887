"""The pieces of all reports: labelled lines, names grouped by reason, paces, shares, JSON."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.errors import by_reason, some
from surgery.exit_codes import JSON_VERSION
from surgery.sizes import as_bytes

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


def as_pace(nbytes: int, seconds: float) -> str:
    """Say how long so many bytes took, and how many there were in a second, each in a unit in which it is not 0."""
    time = f"{seconds:.2f} s" if seconds >= 0.095 else f"{1e3 * seconds:#.2g} ms".replace(". ", " ")
    pace = nbytes / seconds
    return f"{as_bytes(nbytes)} in {time}, {f'{pace / 1e9:.2f} GB' if pace >= 1e8 else as_bytes(pace)}/s"


def as_share(part: int, whole: int) -> str:
    """Return a share in per cent: 0.00% only for nothing and 100.00% only for all."""
    if 0 < part < whole:
        share = part / whole
        return "<0.01%" if share < 5e-5 else ">99.99%" if share > 1 - 5e-5 else f"{share:.2%}"
    return "100.00%" if part and part == whole else "0.00%"
