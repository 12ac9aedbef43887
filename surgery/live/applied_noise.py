"""The noise that perturb_model has added to live models, by weak reference: what their trackers are told of it."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from surgery.live.parts import find_related, unwrap
from surgery.noisytune import NoisyTune

_noise: Any = WeakIdKeyDictionary()


def note_added(model: nn.Module, noise: NoisyTune) -> None:
    """Note what was added to a model, on top of what it has."""
    _noise[unwrap(model)] = (*_noise.get(unwrap(model), ()), noise)


def note_noise(model: nn.Module, noise: NoisyTune) -> None:
    """Note what is known to be in a model's weights."""
    _noise[unwrap(model)] = (noise,)


def forget_noise(model: nn.Module) -> None:
    """Note that a model has no noise any more."""
    _noise.pop(unwrap(model), None)


def find_noise(models: Iterable[nn.Module]) -> Iterator[tuple[NoisyTune, ...]]:
    """Yield the noise of the parts of these models, or of what they are parts of: of each what was added, in order."""
    for part in find_related(models, _noise):
        yield _noise[part]
