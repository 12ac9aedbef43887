"""Metrics in what a command printed: the last `name=value`, `name: value` or `"name": value`."""

import re
from pathlib import Path

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)(?![\w.])"
_ANY = re.compile(
    rf"""(?<![\w./-])(["']?)([A-Za-z_][\w./-]*)\1\s*[=:]\s*(?:tensor\(|np\.float\d+\()?["']?({_NUMBER})""",
    re.IGNORECASE,
)


def read_output(path: Path) -> dict[str, list[float]]:
    """Return every number that a log names, by name, in their order."""
    found: dict[str, list[float]] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    for match in _ANY.finditer(text):
        found.setdefault(match[2], []).append(float(match[3]))
    return found
