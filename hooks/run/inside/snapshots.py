"""Copies of parameters from before somebody wrote to them, kept until the model is patched."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from surgery.live.zero3 import write

from ...weights.pretrained import distributed_like, is_distributed, local, values_of


class Snapshots:
    """Values of parameters, in the CPU's memory, but for DTensors; of what ZeRO-3 has split, the shares.

    They go with the parameters.
    """

    def __init__(self) -> None:
        self._values: Any = WeakIdKeyDictionary()

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep what they are now, unless something older is kept already."""
        for parameter in parameters:
            if parameter not in self._values and not parameter.is_meta:
                self._values[parameter] = _copy(parameter)

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names."""
        for name, parameter in before.items():
            if parameter in self._values and name in after and after[name] is not parameter:
                self._values[after[name]] = _split(self._values.pop(parameter), after[name])

    def replace(self, parameters: Iterable[nn.Parameter], others: "Snapshots") -> None:
        """Keep of these what others have kept of them, where both have something."""
        for parameter in parameters:
            if parameter in self._values and parameter in others._values:
                self._values[parameter] = others._values[parameter]

    def drop(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep these no longer."""
        for parameter in parameters:
            self._values.pop(parameter, None)

    def has(self, parameters: Iterable[nn.Parameter]) -> bool:
        return any(parameter in self._values for parameter in parameters)

    def drop_equal(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep nothing of these if all of them are what they were."""
        kept = {parameter: self._values[parameter] for parameter in parameters if parameter in self._values}
        if all(torch.equal(local(past).cpu(), local(now).detach().cpu()) for now, past in kept.items()):
            self.drop(kept)

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write back what was kept of these."""
        for parameter in parameters:
            if parameter in self._values:
                write(parameter, self._values[parameter])

    @contextmanager
    def restored(self, parameters: Iterable[nn.Parameter], *, is_updating: bool = False) -> Iterator[None]:
        """Give parameters the values that are kept of them, for the body of a `with`.

        Args:
            is_updating: what the body makes of them is what is kept from then on.
        """
        kept = [parameter for parameter in parameters if parameter in self._values]
        present = [_copy(parameter) for parameter in kept]
        self.restore(kept)
        try:
            yield
        finally:
            for parameter, values in zip(kept, present, strict=True):
                if is_updating:
                    self._values[parameter] = _copy(parameter)
                write(parameter, values)


def _split(values: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Split whole values as fully_shard has split a parameter since."""
    if is_distributed(parameter) and not is_distributed(values):
        return distributed_like(parameter, values.to(parameter.device))
    return values


def _copy(parameter: nn.Parameter) -> torch.Tensor:
    values = values_of(parameter)
    return values.clone() if is_distributed(values) else values.to("cpu", copy=True)
