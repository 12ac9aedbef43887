"""A parameter that methods act on, and the places of a model that hold it; tied ones are one target."""

from dataclasses import dataclass

import torch
from torch import nn

from surgery.errors import SourceError
from surgery.live.foreign import is_flat

from .layers import Shape


@dataclass(frozen=True, eq=False)
class Place:
    """Where a model has a parameter.

    Args:
        name: its name in the model.
        module, attribute: what holds it, and as what.
        reader: the module whose forward computes with it.
    """

    name: str
    module: nn.Module
    attribute: str
    reader: nn.Module

    @property
    def parameter(self) -> torch.Tensor:
        """The live parameter."""
        return own_weight(self.name, self.module, self.attribute)


@dataclass
class Target:
    """One parameter that methods act on.

    Args:
        name: its first name in the model.
        names: all of them.
        places: the modules that hold it; of one to mix, those that can be.
        mask: shape of the mask per input feature, and the repeats of its rows; None: it is not a layer's weight to mix.
    """

    name: str
    names: tuple[str, ...]
    places: tuple[Place, ...]
    mask: tuple[Shape, int] | None

    @property
    def owners(self) -> tuple[nn.Module, ...]:
        """The modules that hold it."""
        return tuple(dict.fromkeys(place.module for place in self.places))

    @property
    def weight(self) -> torch.Tensor:
        """The live parameter."""
        return self.places[0].parameter


def own_weight(name: str, module: nn.Module, attribute: str = "weight") -> torch.Tensor:
    """Return a layer's parameter, or the tensor that torch.func.functional_call puts in its place.

    Raises:
        SourceError: another tool has taken it away since the model was patched.
    """
    w = module._parameters.get(attribute)
    if w is None or (not isinstance(w, nn.Parameter) and is_flat(w._base)):
        raise SourceError(
            f"{name}: expected the layer's own parameter, got none. DataParallel, FSDP 1 and parametrizations "
            "take it away: use DistributedDataParallel or fully_shard, and patch after parametrizing."
        )
    return w
