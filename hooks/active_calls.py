"""The calls of a module on the stack of a thread: no hook tells of those that a KeyboardInterrupt has ended."""

import sys
from inspect import unwrap
from types import FrameType

from torch import nn

_CALL_IMPL = unwrap(nn.Module._call_impl).__code__  # `surgery run` may have wrapped it


def count_active_calls(root: nn.Module, *, thread: int | None = None) -> int:
    """Count the calls of a module that are on the stack of this thread, or of that with this number."""
    frame: FrameType | None = sys._getframe(1) if thread is None else sys._current_frames().get(thread)
    count = 0
    while frame is not None:
        count += frame.f_code is _CALL_IMPL and frame.f_locals.get("self") is root
        frame = frame.f_back
    return count
