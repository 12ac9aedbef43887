"""Globs over dotted tensor names, as regular expressions: `*` stays within one part, `**` spans any number."""

import re
from functools import cache

_TOKENS = re.compile(r"\*\*\.|\.\*\*$|\*\*|\*|\?|\[!?[^\]]+\]|.", re.DOTALL)
_REGEX = {"**.": r"(?:.*\.)?", ".**": r"(?:\..*)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}


@cache
def _compile(glob: str) -> re.Pattern[str]:
    parts = []
    for token in _TOKENS.findall(glob):
        if token in _REGEX:
            parts.append(_REGEX[token])
        elif token.startswith("[") and len(token) > 1:
            negated, members = token[1] == "!", token[1:-1].lstrip("!").replace("\\", r"\\")
            parts.append(f"[{'^' if negated else ''}{members}]")
        else:
            parts.append(re.escape(token))
    return re.compile("".join(parts), re.DOTALL)


def matches(glob: str, name: str) -> bool:
    """Tell whether the whole of `name` matches `glob`. Case counts.

    `encoder.layer.*.output.**` matches encoder.layer.3.output.dense.weight; `**.bias` matches every bias.
    """
    return _compile(glob).fullmatch(name) is not None
