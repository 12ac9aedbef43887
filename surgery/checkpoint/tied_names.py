"""The names of input and output embeddings that models tie, and which of them a file should keep."""

import re

# The names under which models keep the two, the one that the others are tied to first.
_ROLES = (
    re.compile(r"(?:.*\.)?shared\.weight"),
    re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in)\.weight"),
    re.compile(r"(?:.*\.)?predictions\.bias"),
    re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output|output_projection|predictions\.decoder)\.(?:weight|bias)"),
)


def rank(name: str) -> int:
    """Return a name's place among those that models tie, the one to keep first; 0 if it is none of them."""
    return next((place for place, role in enumerate(_ROLES, 1) if role.fullmatch(name)), 0)
