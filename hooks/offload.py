"""w_pre in the CPU's memory: pinned, and copied to the GPU while the layer before it computes."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .pretrained import Pretrained


class Offload:
    """Fetches what one model keeps in the CPU's memory, one weight ahead.

    The order of the weights is learned as they are fetched: forward and backward passes each have their own. A wrong
    guess costs time only.
    """

    def __init__(self) -> None:
        self._last: dict[bool, int] = {}
        self._after: dict[tuple[bool, int], Pretrained] = {}
        self._ahead: tuple[int, torch.Tensor, Any] | None = None
        self._streams: dict[torch.device, Any] = {}

    def fetch(self, pretrained: "Pretrained", w: torch.Tensor) -> torch.Tensor:
        """Return the values of `pretrained` on the device and in the dtype of `w`."""
        values = pretrained.values
        assert values is not None
        if w.device.type != "cuda" or torch.compiler.is_compiling():
            return values.to(w.device, w.dtype, non_blocking=w.device.type == "cuda")
        fetched = self._take(pretrained, w.device)
        if fetched is None:
            fetched = _pinned(pretrained).to(w.device, non_blocking=True)
        self._start_next(pretrained, w.device)
        return fetched.to(w.dtype)

    def _take(self, pretrained: "Pretrained", device: torch.device) -> torch.Tensor | None:
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != id(pretrained) or ahead[1].device != device:
            return None
        _, fetched, is_here = ahead
        stream = torch.cuda.current_stream(device)
        stream.wait_event(is_here)
        fetched.record_stream(stream)  # its memory belongs to the other stream's pool
        return fetched

    def _start_next(self, pretrained: "Pretrained", device: torch.device) -> None:
        is_backward = torch._C._current_graph_task_id() != -1
        if (last := self._last.get(is_backward)) is not None:
            self._after[is_backward, last] = pretrained
        self._last[is_backward] = id(pretrained)
        following = self._after.get((is_backward, id(pretrained)))
        if following is None or following is pretrained:
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        with torch.cuda.stream(stream):
            fetched = _pinned(following).to(device, non_blocking=True)
            self._ahead = id(following), fetched, stream.record_event()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Offload":
        return Offload()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Offload, ()


def _pinned(pretrained: "Pretrained") -> torch.Tensor:
    assert pretrained.values is not None
    if not pretrained.values.is_pinned():
        pretrained.values = pretrained.values.pin_memory()
    return pretrained.values
