"""w_pre in the CPU's memory: pinned, and copied to the GPU while the layer before it computes."""

import sys
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Kept(Protocol):
    """Values that are kept in the CPU's memory."""

    values: torch.Tensor | None


class Order:
    """What follows what: learned as it happens, for forward and backward passes apart."""

    def __init__(self) -> None:
        self._last: dict[bool, Kept] = {}
        self._after: dict[tuple[bool, int], Kept] = {}

    def follow(self, current: Kept, *, is_backward: bool) -> Kept | None:
        """Note that it is the turn of `current`; return what came after it the last time, if anything else did."""
        if (last := self._last.get(is_backward)) is not None:
            self._after[is_backward, id(last)] = current
        self._last[is_backward] = current
        following = self._after.get((is_backward, id(current)))
        return None if following is current else following


@dataclass(frozen=True)
class _Ahead:
    """Values on their way: `home` is the stream whose memory they are in, `is_here` the end of the copy."""

    pretrained: Kept
    values: torch.Tensor
    home: Any
    is_here: Any


@dataclass
class Offload:
    """Fetches what one model keeps in the CPU's memory, one weight ahead. A wrong guess costs time only."""

    _order: Order = field(default_factory=Order)
    _ahead: _Ahead | None = None
    _streams: dict[torch.device, Any] = field(default_factory=dict)

    def fetch(self, pretrained: Kept, w: torch.Tensor) -> torch.Tensor:
        """Return the values of `pretrained` on the device and in the dtype of `w`."""
        values = pretrained.values
        assert values is not None
        if w.device.type != "cuda" or torch.compiler.is_compiling():
            return values.to(w.device, w.dtype, non_blocking=w.device.type == "cuda")
        ahead = self._arrived()
        if ahead is not None and ahead.pretrained is pretrained and ahead.values.device == w.device:
            fetched = ahead.values
        else:
            fetched = _pinned(pretrained).to(w.device, non_blocking=True)
        following = self._order.follow(pretrained, is_backward=torch._C._current_graph_task_id() != -1)
        if following is not None:
            self._start(following, w.device)
        return fetched.to(w.dtype)

    def _arrived(self) -> _Ahead | None:
        """Have this stream wait for what is on its way, needed or not: its memory may be written to from then on."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            stream = torch.cuda.current_stream(ahead.values.device)
            stream.wait_event(ahead.is_here)
            if stream != ahead.home:
                ahead.values.record_stream(stream)
        return ahead

    def _start(self, pretrained: Kept, device: torch.device) -> None:
        """Copy on a stream of its own, into memory of this one.

        Memory of the other stream would not be used again before the GPU is done with it, and Python is far ahead of
        the GPU: all of w_pre would come to lie there.
        """
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream, home = self._streams[device], torch.cuda.current_stream(device)
        source = _pinned(pretrained)
        values = torch.empty_like(source, device=device)
        stream.wait_stream(home)
        with torch.cuda.stream(stream):
            values.copy_(source, non_blocking=True)
            self._ahead = _Ahead(pretrained, values, home, stream.record_event())

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._arrived()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Offload":
        return Offload()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Offload, ()


def _pinned(pretrained: Kept) -> torch.Tensor:
    assert pretrained.values is not None
    if not pretrained.values.is_pinned():
        pretrained.values = pretrained.values.pin_memory()
    return pretrained.values
