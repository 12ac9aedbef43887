"""PyTorch pickles (.bin, .pt, .pth, .ckpt) read with torch.load(weights_only=True, mmap=True), so that no code runs."""

import math
import pickle
import re
import threading
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.checkpoint.at_rest import Stamp, refuse_changed
from surgery.checkpoint.descriptors import Descriptor
from surgery.checkpoint.digests import algorithm_of, digest_of
from surgery.checkpoint.foreign_files import PYTORCH, foreign_file, holds_a_module
from surgery.checkpoint.legacy_storages import refuse_unlisted
from surgery.checkpoint.pickle_records import is_mappable, refuse_unread
from surgery.checkpoint.state_dicts import find_state_dict
from surgery.checkpoint.storages import overlap
from surgery.checkpoint.tensorfile import Header, Tensor, build_header
from surgery.checkpoint.tied_names import order
from surgery.errors import SourceError

_MOST_EXPANDED = 1 << 30  # bytes of a tensor that repeats its elements: it is laid out in memory to be read
_one_at_a_time = threading.Lock()
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""Plain dtypes, and safetensors' names for them."""


class PickleFile:
    """Reads one PyTorch file through the interface of TensorFile; its header is the one of the safetensors to write.

    Tensors that share their storage element for element are one tensor, under the name that comes first, as
    transformers writes them.

    Args:
        repeating: names that shall stand for others, where they share a storage.
    """

    descriptor: Descriptor | None = None
    """Tensors do not lie in the file as the header says."""

    def __init__(self, path: Path, *, label: str, key: str | None = None, repeating: Collection[str] = ()) -> None:
        self.path = path
        self._stamp = Stamp.of(path)
        found = find_state_dict(_load(path, label), label, key=key)
        state_dict = {name: tensor.detach() for name, tensor in found.items()}
        self.tied = ties(state_dict, label, repeating)
        self.tensors = {name: tensor for name, tensor in state_dict.items() if name not in self.tied}
        entries = [(name, _dtype(name, t, label), tuple(t.shape)) for name, t in self.tensors.items()]
        self.header: Header = build_header(entries, {"format": "pt"})

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""
        self._refuse_cut()
        stored = self.tensors[tensor.name] = self.tensors[tensor.name].contiguous()
        flat = stored.as_strided((stored.numel(),), (1,)).view(torch.uint8)  # one element may have any stride
        np.copyto(np.frombuffer(buffer, np.uint8), flat[start : start + len(buffer)].numpy())

    def _refuse_cut(self) -> None:
        """Refuse a file that has become shorter: reading a mapped page that is gone would end the process."""
        if not self.path.exists() or self.path.stat().st_size < self._stamp.size:
            self.refuse_changed()

    def digest(self, algorithm: str) -> str | None:
        """Hash the file: its bytes are not those that pass when its tensors are read."""
        return digest_of(self.path, algorithm)

    def settle(self, digest: str) -> None:
        """Check that the file is still what it was when opened.

        Raises:
            SourceError: it is not.
        """
        self.refuse_changed()
        if digest != self.digest(algorithm_of(digest)):
            raise SourceError(
                f"{self.path}: expected a file at rest, got one that changed while it was read. Run again."
            )

    def refuse_changed(self) -> None:
        """Refuse a file that has been removed, replaced or written to since it was opened.

        Raises:
            SourceError: it has.
        """
        refuse_changed(self.path, self._stamp)

    def close(self) -> None:
        self.tensors = {}


def _load(path: Path, label: str) -> Any:
    try:
        # torch warns of what it then refuses; catch_warnings is not made for threads
        with _one_at_a_time, warnings.catch_warnings(action="ignore"):
            return _load_mapped(path, label)
    except (OSError, SourceError):
        raise
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        raise _refusal(error, path, label) from error


def _refusal(error: Exception, path: Path, label: str) -> SourceError:
    match = re.search(r"(?:GLOBAL|global|class|function) ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and match:
        if holds_a_module(path):
            return SourceError(
                f"{label}: expected a pickle of nothing but tensors, got a whole module, {match[1]}. "
                "It was not run; save its state_dict() with torch.save where it was trained."
            )
        return SourceError(
            f"{label}: expected a pickle of nothing but tensors, got one that calls {match[1]}. "
            "It was not run; get safetensors instead."
        )
    return foreign_file(path, label, PYTORCH) or SourceError(
        f"{label}: expected a PyTorch checkpoint, got a damaged or another file. Fetch it again."
    )


def _load_mapped(path: Path, label: str) -> Any:
    if not is_mappable(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        refuse_unread(path, label)
        return loaded
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # only files of torch before 1.6 cannot be mapped
            raise
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    refuse_unlisted(path, label)
    return loaded


def _dtype(name: str, tensor: torch.Tensor, label: str) -> str:
    """Return safetensors' name of a tensor's dtype; refuse what is no plain tensor."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise SourceError(
            f"{label}: {name!r}: expected a plain tensor, got a {type(tensor).__name__}. Save the whole tensor."
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in DTYPES:
        kind = "a quantized tensor" if tensor.is_quantized else f"{tensor.dtype}, {tensor.layout}"
        raise SourceError(f"{label}: {name!r}: expected a dense tensor of a plain dtype, got {kind}. Convert it first.")
    nbytes = math.prod(tensor.shape) * tensor.element_size()  # tensor.nbytes is one of 64 bits
    if nbytes > max(_MOST_EXPANDED, tensor.untyped_storage().nbytes()):
        raise SourceError(
            f"{label}: {name!r}: expected a tensor of elements of its own, got {nbytes} bytes that repeat "
            f"{tensor.untyped_storage().nbytes()}. Save what it repeats."
        )
    return DTYPES[tensor.dtype]


def ties(state_dict: Mapping[str, torch.Tensor], label: str, repeating: Collection[str] = ()) -> dict[str, str]:
    """Map each name that repeats another tensor's storage to the name to keep for it; refuse partial overlaps.

    That is the first name, but the input embedding's rather than the output's: loaders look for it.
    """
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    stored: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in sorted(state_dict.items(), key=lambda item: order(item[0], repeating)):
        if tensor.numel() == 0 or tensor.layout is not torch.strided:
            continue
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if identity in first:
            tied[name] = first[identity]
            continue
        first[identity] = name
        stored.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
    for tensors in stored.values():
        if pair := overlap(tensors):
            raise SourceError(
                f"{label}: {pair[1]!r}: expected tensors that are equal or apart, got one that overlaps {pair[0]!r}. "
                "Save a copy of it with .clone()."
            )
    return tied
