"""Forward hooks that have a module compute with W_mix in the place of its weights while it runs, and its marks."""

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from surgery.errors import SourceError

from ..marks import Mark, put
from ..regularizer import Handle
from ..weights.target import Place
from .mixing import Shadow
from .recurrent import put_flat

MIXED = "_surgery_mixed"
"""The attribute of a module that holds its mark."""


class Mixed(Protocol):
    """A weight that is mixed."""

    @property
    def name(self) -> str: ...

    @property
    def places(self) -> Sequence[Place]: ...

    def mixed(self, w: torch.Tensor, place: Place) -> torch.Tensor:
        """Return W_mix for one call of the module that reads it."""
        ...


class Shadowed(Mark):
    """Left on a module whose weights are replaced while it, or what reads them, runs.

    Args:
        attributes: of these weights.
    """

    attribute = MIXED

    def __init__(self, *attributes: str) -> None:
        self.attributes = list(attributes)
        self.hidden: dict[str, torch.Tensor] = {}  # the weights themselves, under torch.compile, meanwhile

    def release(self, module: nn.Module) -> None:
        """Take it off a module, and the W_mix that an interrupted forward has left."""
        if module.__dict__.get(MIXED) is self:
            reveal(module)
        super().release(module)

    def restore(self, attributes: MutableMapping[str, Any]) -> None:
        """Leave W_mix out of a module's attributes, or of a copy of them."""
        for attribute in self.attributes:
            if isinstance(attributes.get(attribute), Shadow):
                del attributes[attribute]
                put_flat(attributes, attribute, attributes["_parameters"].get(attribute))
        super().restore(attributes)


class Reader(Shadowed):
    """Left on a module whose forward computes with mixed weights, be they its own or those of a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[Place, Mixed]] = []


def attach(weights: Iterable[Mixed]) -> list[Handle]:
    """Have weights mixed wherever they are read in training mode."""
    reads = [(place, own) for own in weights for place in own.places]
    readers = {place.reader: Reader() for place, _ in reads}
    marks: dict[nn.Module, Shadowed] = dict(readers)
    for place, own in reads:
        readers[place.reader].reads.append((place, own))
        marks.setdefault(place.module, Shadowed()).attributes.append(place.attribute)
    handles: list[Handle] = [put(module, mark) for module, mark in marks.items()]
    for module in readers:
        # first of the forward hooks: FSDP's put the sharded weight back in theirs
        last = module.register_forward_hook(reveal_weights, prepend=True, always_call=True)
        handles += [module.register_forward_pre_hook(shadow_weights), last]
    return handles


def shadow_weights(module: nn.Module, args: Any) -> None:
    """Put W_mix before the weights that a module reads; a forward pre-hook.

    The Parameter stays where it is, in module._parameters: an attribute of the instance is found before it. torch 2.8
    cannot compile taking that away again, so there they change places; when the compiled code is left, nothing has.
    """
    reveal_weights(module, args, None)  # a KeyboardInterrupt runs no hooks: the last forward may have left its W_mix
    if not module.training:
        return
    reader: Reader = getattr(module, MIXED)
    for place, own in reader.reads:
        w = place.parameter
        if w.requires_grad:
            refuse_copy(reader, own.name)
            put_before(place.module, place.attribute, w, own.mixed(w, place))


def refuse_copy(mark: Mark, name: str) -> None:
    """Raise in a copy of a part of a patched model."""
    if mark.is_copy:
        raise SourceError(
            f"{name}: expected a layer of a patched model, got one that was copied or loaded without it. "
            "Call unpatch_model or patch_model on the model that it is in now."
        )


def put_before(module: nn.Module, attribute: str, w: torch.Tensor, mixed: torch.Tensor) -> None:
    """Have a module compute with W_mix until `reveal` is called."""
    own: Shadowed = getattr(module, MIXED)
    if torch.compiler.is_compiling():
        own.hidden[attribute] = w
        module._parameters[attribute] = mixed  # type: ignore[assignment]
    else:
        module.__dict__[attribute] = mixed
    put_flat(module.__dict__, attribute, mixed)


def reveal_weights(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    """Take W_mix away again; a forward hook that is also called when forward raises."""
    reader: Reader = getattr(module, MIXED)
    for place, _ in reader.reads:
        reveal(place.module)


def reveal_left(modules: Iterable[nn.Module]) -> None:
    """Take away the W_mix that an interrupted forward has left on modules that may be patched no more."""
    for module in modules:
        if MIXED in module.__dict__:
            reveal(module)


def reveal(module: nn.Module) -> None:
    """Take away the W_mix that a forward has left on a module."""
    own: Shadowed = getattr(module, MIXED)
    for attribute in own.attributes:
        if attribute in module.__dict__ and attribute in module._parameters:  # else it is what another tool made of it
            del module.__dict__[attribute]
            put_flat(module.__dict__, attribute, module._parameters[attribute])
        if attribute in own.hidden:
            module._parameters[attribute] = own.hidden.pop(attribute)  # type: ignore[assignment]
            put_flat(module.__dict__, attribute, module._parameters[attribute])
