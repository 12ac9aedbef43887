"""What a tensor of a checkpoint is, a parameter or a buffer, and how that is known."""

from dataclasses import dataclass

BUFFER = "a buffer, not a parameter"
"""Why a buffer is left as it is, in a file or on a live model; what kind of buffer may follow after a colon."""

CLASS, RULE, NAME, VALUE = "class", "rule", "name", "value"


@dataclass(frozen=True)
class Role:
    """What a tensor is.

    Args:
        is_buffer: whether it is a buffer.
        known: from the model's CLASS, by a RULE on the names beside its own, by its last NAME alone, or by its VALUEs;
            None where a recipe does not say.
        what: kind of buffer, in a few words, where a rule knows it.
    """

    is_buffer: bool
    known: str | None
    what: str = ""

    @property
    def reason(self) -> str | None:
        """Why it is left as it is; None for a parameter."""
        if not self.is_buffer:
            return None
        return f"{BUFFER}: {self.what}" if self.what else BUFFER


def is_buffers_reason(reason: str | None) -> bool:
    """Tell whether this is why a buffer was left as it is."""
    return reason is not None and (reason == BUFFER or reason.startswith(f"{BUFFER}: "))


def role_of_reason(reason: str | None, known: str | None) -> Role:
    """Return the role that a record was made by, from why its tensor was copied; None if it was perturbed."""
    if reason is None or not is_buffers_reason(reason):
        return Role(False, known)
    return Role(True, known, reason.removeprefix(BUFFER).removeprefix(": "))
