"""A few elements of each weight from before and after the noise, which tell whether the noise is still there."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ...weights.pretrained import local

_SAMPLED, _KEPT = 4096, 16  # elements of a weight: noise may vanish in the rounding of many


@dataclass
class _Probe:
    """Elements of one weight that the noise has changed: their places in it, and what they were before and after.

    Args:
        size: of the weight, or of its part on this rank.
    """

    size: int
    places: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor

    def has(self, expected: torch.Tensor, parameter: nn.Parameter) -> bool:
        """Tell whether the elements are these now, in the weight's dtype, whatever that has become."""
        now = _flat(parameter)
        return torch.equal(now[self.places.to(now.device)].cpu(), expected.to(now.dtype))


class Probes:
    """Probes of the weights that noise was added to. They go with the weights."""

    def __init__(self) -> None:
        self._probes: Any = WeakIdKeyDictionary()

    @contextmanager
    def taken(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Take probes of what the body of a `with` changes in these."""
        before = {one: (places := _places(one), _at(one, places)) for one in parameters if local(one).numel()}
        yield
        for one, (places, was) in before.items():
            now = _at(one, places)
            changed = (now != was).nonzero().flatten()
            kept = changed[:: max(1, len(changed) // _KEPT)][:_KEPT]
            if len(kept):
                self._probes[one] = _Probe(local(one).numel(), places[kept], was[kept], now[kept])

    def has(self, parameter: nn.Parameter) -> bool:
        """Tell whether the noise has changed this one."""
        return self._find(parameter) is not None

    def _find(self, parameter: nn.Parameter) -> _Probe | None:
        """Return the probe of a parameter; ZeRO-3 may have split it since, which leaves none."""
        probe: _Probe | None = self._probes.get(parameter)
        return probe if probe is not None and probe.size == local(parameter).numel() else None

    def lost(self, parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
        """Count which of these have other elements than the noise made of them, and all that have a probe."""
        probed = [(one, probe) for one in parameters if (probe := self._find(one)) is not None]
        return sum(not probe.has(probe.after, one) for one, probe in probed), len(probed)

    def is_any_as_before(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Tell whether some of these are again what they were before the noise."""
        found = ((one, self._find(one)) for one in parameters)
        return any(probe is not None and probe.has(probe.before, one) for one, probe in found)

    def drop(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            self._probes.pop(parameter, None)

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names; those that were split have none any more."""
        for name, parameter in before.items():
            probe = self._probes.pop(parameter, None) if name in after and after[name] is not parameter else None
            if probe is not None and local(after[name]).shape == local(parameter).shape:
                self._probes[after[name]] = probe


def _flat(parameter: nn.Parameter) -> torch.Tensor:
    return local(parameter).detach().reshape(-1)


def _places(parameter: nn.Parameter) -> torch.Tensor:
    size = local(parameter).numel()
    return torch.arange(0, size, max(1, size // _SAMPLED))


def _at(parameter: nn.Parameter, places: torch.Tensor) -> torch.Tensor:
    flat = _flat(parameter)
    return flat[places.to(flat.device)].cpu()
