"""The names of input and output embeddings that models tie, and which of them a file should keep."""

import re
from collections.abc import Iterable

# The names under which models keep the two, the one that the others are tied to first.
_ROLES = (
    re.compile(r"(?:.*\.)?shared\.weight"),
    re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in)\.weight"),
    re.compile(r"(?:.*\.)?predictions\.bias"),
    re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output|output_projection|predictions\.decoder)\.(?:weight|bias)"),
)


def may_be_dropped(name: str, stored: Iterable[str]) -> bool:
    """Tell whether models tie a name to one of those that are stored, so that files need not hold it."""
    place, kind = rank(name), name.rpartition(".")[2]
    return any(0 < rank(other) < place and other.rpartition(".")[2] == kind for other in stored)


def rank(name: str) -> int:
    """Return a name's place among those that models tie, the one to keep first; 0 if it is none of them."""
    return next((place for place, role in enumerate(_ROLES, 1) if role.fullmatch(name)), 0)
