"""The noise that perturb_model has added to live models, by weak reference: what their trackers are told of it."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from surgery.live.parts import unwrap
from surgery.noisytune import NoisyTune

_noise: Any = WeakIdKeyDictionary()


def note_noise(model: nn.Module, noise: NoisyTune) -> None:
    """Note what was added to a model, or what is known to be in its weights."""
    _noise[unwrap(model)] = noise


def forget_noise(model: nn.Module) -> None:
    """Note that a model has no noise any more."""
    _noise.pop(unwrap(model), None)


def find_noise(models: Iterable[nn.Module]) -> Iterator[NoisyTune]:
    """Yield the noise of the parts of these models, or of what they are parts of."""
    for part in find_related(models, _noise):
        yield _noise[part]


def find_related(models: Iterable[nn.Module], known: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those of the known modules that are in one of these models, or else that hold one of them."""
    known = list(known)
    if not known:
        return []
    inner = [unwrap(model) for model in models]
    parts = {id(module) for model in inner for module in model.modules()}
    roots = {id(model) for model in inner}
    found = [one for one in known if id(one) in parts]
    return found or [one for one in known if any(id(module) in roots for module in one.modules())]
