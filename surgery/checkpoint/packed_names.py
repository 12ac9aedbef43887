"""Tensors of quantized weights, told by name and dtype: not every checkpoint has the config that says so."""

from collections.abc import Collection

from surgery.checkpoint.tensorfile import Tensor

_NAMES = (
    (".qweight", ".qzeros"),  # GPTQ, AWQ
    (".SCB", ".absmax", ".quant_map"),  # bitsandbytes, 8 and 4 bits
    (".weight_packed", ".weight_scale_inv"),  # compressed-tensors, block FP8
    (".W_q", ".q_weight", ".weight._data"),  # HQQ, EXL2, Quanto
)
_PACKED = tuple(name for names in _NAMES for name in names)
BLOCKS, SCALES = "_blocks", "_scales"
"""What mxfp4 adds to the name of a weight, in bytes."""
SCALE = "_scale_inv"
"""What float8 in blocks adds to it."""
_OF_ACTIVATIONS = ".activation_scale"
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")


def is_quantized(tensor: Tensor) -> bool:
    """Tell whether a tensor holds quantized weights or what they are scaled by.

    A matrix of integers under the name of a weight is one, whoever wrote it: it cannot be trained.
    """
    name = tensor.name
    if name.endswith(_PACKED) or (tensor.dtype == "U8" and name.endswith((BLOCKS, SCALES))):
        return True
    return tensor.dtype in _INTEGERS and len(tensor.shape) > 1 and name.rpartition(".")[2] == "weight"


def is_scale(tensor: Tensor) -> bool:
    """Tell whether a tensor of a float8 or mxfp4 checkpoint is a scale, of a weight or of activations."""
    return _is_scale_of_float8(tensor.name) or (tensor.dtype == "U8" and tensor.name.endswith(SCALES))


def weight_of(scale: Tensor) -> str:
    """Return the name of the stored weight that a scale belongs to."""
    if scale.name.endswith(SCALE):
        return scale.name.removesuffix(SCALE)
    if scale.name.endswith(_OF_ACTIVATIONS):
        return scale.name.removesuffix(_OF_ACTIVATIONS) + ".weight"
    return scale.name.removesuffix(SCALES) + BLOCKS


def plain_names(names: Collection[str]) -> dict[str, str]:
    """Return the names that the weights of a float8 or mxfp4 checkpoint have without scales, by their own names."""
    plain = {name: name for name in names if not _is_scale_of_float8(name)}
    for name in names:
        weight = name.removesuffix(BLOCKS)
        if name.endswith(BLOCKS) and weight + SCALES in plain:
            plain[name] = weight
            del plain[weight + SCALES]
    return plain


def _is_scale_of_float8(name: str) -> bool:
    return name.endswith((SCALE, _OF_ACTIVATIONS))
