"""The mask that a parameter's kind of layer takes, or why it is never mixed."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from torch import nn

from surgery.live.zero3 import shape_of

from .layers import Shape, feature_axes, is_part_of_weight, is_read_by_attention, mask_shape, packing
from .target import Place

NOT_A_WEIGHT = "bias, norm or another vector"
EMBEDDING = "embedding: name it in include to mix it"
_UNKNOWN = "of {}, a kind of layer that is not mixed"
_BESIDE_KNOWN = "of {}, of which only these are mixed: {}"
_RENORMALIZED = "embedding with max_norm, which renormalizes its weight in place as it is used"
_COMPLEX = "of complex numbers"
_QUANTIZED = "quantized to {}"
_PARAMETRIZED = "part of a weight that parametrize or weight_norm computes anew at each call"
_IN_ATTENTION = "read by nn.MultiheadAttention without a call of the layer, so that no hook fires"
_IN_PEFT = "of a layer whose weight PEFT replaces at each call"


def mask_of(places: Sequence[Place], swapped: AbstractSet[nn.Module], *, is_requested: bool) -> tuple[Shape, int] | str:
    """Return the mask's shape, or why a parameter is never mixed. A linear layer's view of a tied weight goes first.

    Args:
        places: all that hold the parameter.
        swapped: the layers whose weights PEFT replaces.
        is_requested: embeddings are mixed too.
    """
    if all(is_part_of_weight(place.module, place.attribute) for place in places):
        return _PARAMETRIZED
    masks = [(place, mask) for place in places if (mask := mask_shape(place.module, place.attribute))]
    linear = [(place, mask) for place, mask in masks if not isinstance(place.module, nn.Embedding)]
    if not masks:
        return _unknown(places[0])
    place, mask = (linear or masks)[0]
    if why := unfit(place):
        return why
    if any(getattr(place.module, "max_norm", None) is not None for place, _ in masks):
        return _RENORMALIZED
    if not linear and not is_requested:
        return EMBEDDING
    if not swapped.isdisjoint(place.module for place in places):
        return _IN_PEFT
    is_read_elsewhere = is_read_by_attention(place.module) and place.reader is place.module
    return _IN_ATTENTION if is_read_elsewhere else mask


def _unknown(place: Place) -> str:
    """Say why no mask is known for a parameter of one of the other kinds of layers, or one that is no weight."""
    if len(shape_of(place.parameter)) < 2 or "bias" in place.attribute:
        return NOT_A_WEIGHT
    kind = type(place.module).__name__
    known = [name for name in feature_axes(place.module) if place.module._parameters.get(name) is not None]
    return _BESIDE_KNOWN.format(kind, ", ".join(known)) if known else _UNKNOWN.format(kind)


def unfit(place: Place) -> str | None:
    """Return why no method can act on a parameter, whatever it is for."""
    if place.parameter.is_complex():
        return _COMPLEX
    packed = packing(place.parameter)
    return _QUANTIZED.format(packed) if packed else None
