"""Tensors of quantized weights, told by name and dtype: not every checkpoint has the config that says so."""

from surgery.checkpoint.tensorfile import Tensor

_NAMES = (
    (".qweight", ".qzeros"),  # GPTQ, AWQ
    (".SCB", ".absmax", ".quant_map"),  # bitsandbytes, 8 and 4 bits
    (".weight_packed", ".weight_scale_inv"),  # compressed-tensors, block FP8
    (".W_q", ".q_weight", ".weight._data"),  # HQQ, EXL2, Quanto
)
_PACKED = tuple(name for names in _NAMES for name in names)
_BYTES = ("_blocks", "_scales")  # MXFP4
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")


def is_quantized(tensor: Tensor) -> bool:
    """Tell whether a tensor holds quantized weights or what they are scaled by.

    A matrix of integers under the name of a weight is one, whoever wrote it: it cannot be trained.
    """
    name = tensor.name
    if name.endswith(_PACKED) or (tensor.dtype == "U8" and name.endswith(_BYTES)):
        return True
    return tensor.dtype in _INTEGERS and len(tensor.shape) > 1 and name.rpartition(".")[2] == "weight"
