"""Which tensors may be one: the names of embeddings that models tie, and which of them a file should keep."""

import re
from collections.abc import Collection, Iterable

LEAST = 256
"""Elements of the smallest tensors that are tied for nothing but equal bits."""

# The names under which models keep the two, the one that the others are tied to first.
_INPUTS = (
    re.compile(r"(?:.*\.)?shared\.weight"),
    re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in)\.weight"),
    re.compile(r"(?:.*\.)?predictions\.bias"),
)
_OUTPUT = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output|output_projection|predictions\.decoder)\.(?:weight|bias)")


def may_be_dropped(name: str, stored: Iterable[str]) -> bool:
    """Tell whether models tie a name to one of those that are stored, so that files need not hold it."""
    place, kind = _place(name), name.rpartition(".")[2]
    others = (other for other in stored if is_embedding(other) and other.rpartition(".")[2] == kind)
    return is_embedding(name) and any(_place(other) < place for other in others)


def is_embedding(name: str) -> bool:
    """Tell whether it is a name under which models keep input or output embeddings."""
    return bool(_OUTPUT.fullmatch(name)) or any(role.fullmatch(name) for role in _INPUTS)


def order(name: str, repeating: Collection[str] = ()) -> tuple[bool, int]:
    """Sort the names of one tensor, the one to keep first: an input embedding's, and an output's last.

    Args:
        repeating: those that are known to stand for others, such as by the model's class.
    """
    return name in repeating, _place(name)


def _place(name: str) -> int:
    inputs = next((place for place, role in enumerate(_INPUTS) if role.fullmatch(name)), len(_INPUTS))
    return len(_INPUTS) + 1 if _OUTPUT.fullmatch(name) else inputs
