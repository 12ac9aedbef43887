"""What is planned for one weight file, from its header alone."""

from dataclasses import dataclass, field

from surgery.checkpoint.packed_names import is_quantized
from surgery.checkpoint.tensorfile import Header, Tensor
from surgery.noisytune import FLOATS
from surgery.roles import Role


@dataclass(frozen=True)
class ShardPlan:
    """One weight file: where it comes from, what it becomes, and why tensors are copied.

    Args:
        source: name relative to the source.
        name: name relative to the output.
        header: of the file to write.
        copied: reason by tensor name, for the tensors that will be copied.
        tied: names that repeat another tensor, and that tensor's name.
        roles: what each tensor is, by name.
        class_ties: names of its model that the class ties to another, and that one's name.
    """

    source: str
    name: str
    header: Header
    copied: dict[str, str]
    tied: dict[str, str]
    roles: dict[str, Role]
    class_ties: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.header.file_size


def floats(header: Header) -> list[Tensor]:
    """Return the tensors whose dtype can be perturbed."""
    return [tensor for tensor in header.tensors if tensor.dtype in FLOATS]


def is_packed(tensor: Tensor) -> bool:
    """Tell whether a tensor's dtype or name is one of quantized weights, which are refused."""
    return (tensor.dtype.startswith("F") and tensor.dtype not in FLOATS) or is_quantized(tensor)
