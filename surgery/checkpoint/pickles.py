"""PyTorch pickles (.bin, .pt, .pth, .ckpt) read with torch.load(weights_only=True, mmap=True), so that no code runs."""

import pickle
import re
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.checkpoint.at_rest import Stamp, refuse_changed
from surgery.checkpoint.digests import sha256_of
from surgery.checkpoint.foreign_files import PYTORCH, foreign_file, holds_a_module
from surgery.checkpoint.tensorfile import Header, Tensor, build_header
from surgery.checkpoint.tied_names import rank
from surgery.errors import SourceError

_NESTS = ("state_dict", "model_state_dict", "model", "module")
_DEPTH = 8
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
    """

    def __init__(self, path: Path, *, label: str) -> None:
        self.path = path
        self._stamp = Stamp.of(path)
        state_dict = _state_dict(_load(path, label), label)
        self.tied = ties(state_dict, label)
        self._tensors = {name: tensor for name, tensor in state_dict.items() if name not in self.tied}
        entries = [(name, _dtype(name, t, label), tuple(t.shape)) for name, t in self._tensors.items()]
        self.header: Header = build_header(entries, {"format": "pt"})

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""
        stored = self._tensors[tensor.name] = self._tensors[tensor.name].contiguous()
        flat = stored.reshape(-1).view(torch.uint8)
        np.copyto(np.frombuffer(buffer, np.uint8), flat[start : start + len(buffer)].numpy())

    def sha256(self) -> str | None:
        """Hash the file: its bytes are not those that pass when its tensors are read."""
        return sha256_of(self.path)

    def settle(self, sha256: str) -> None:
        """Check that the file is still what it was when opened.

        Raises:
            SourceError: it is not.
        """
        self.refuse_changed()
        if sha256 != sha256_of(self.path):
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
        self._tensors = {}


def _load(path: Path, label: str) -> Any:
    try:
        # torch warns of what it then refuses; catch_warnings is not made for threads
        with _one_at_a_time, warnings.catch_warnings(action="ignore"):
            return _load_mapped(path)
    except OSError:
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


def _load_mapped(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # only files of torch before 1.6 cannot be mapped
            raise
    return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(loaded: Any, label: str) -> dict[str, torch.Tensor]:
    """Find the state_dict, which training frameworks nest under names of their own."""
    for _ in range(_DEPTH):  # a pickle may hold itself
        nest = next(
            (name for name in _NESTS if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping)), None
        )
        if nest is None:
            break
        loaded = loaded[nest]
    found = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)} if isinstance(loaded, Mapping) else {}
    if not found or not all(isinstance(name, str) for name in found):
        raise SourceError(
            f"{label}: expected a state_dict, got none, also not under {', '.join(_NESTS)}. Save one with torch.save."
        )
    return {name: tensor.detach() for name, tensor in found.items()}


def _dtype(name: str, tensor: torch.Tensor, label: str) -> str:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in DTYPES:
        kind = "a quantized tensor" if tensor.is_quantized else f"{tensor.dtype}, {tensor.layout}"
        raise SourceError(f"{label}: {name!r}: expected a dense tensor of a plain dtype, got {kind}. Convert it first.")
    return DTYPES[tensor.dtype]


def ties(state_dict: Mapping[str, torch.Tensor], label: str) -> dict[str, str]:
    """Map each name that repeats another tensor's storage to the name to keep for it; refuse partial overlaps.

    That is the first name, but the input embedding's rather than the output's: loaders look for it.
    """
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in sorted(state_dict.items(), key=lambda item: rank(item[0])):
        if tensor.numel() == 0 or tensor.layout is not torch.strided:
            continue
        storage = tensor.untyped_storage().data_ptr()
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if identity in first:
            tied[name] = first[identity]
            continue
        first[identity] = name
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        begin = tensor.data_ptr()
        end = begin + reach * tensor.element_size()
        for other_begin, other_end, other in spans.setdefault(storage, []):
            if begin < other_end and other_begin < end:
                raise SourceError(
                    f"{label}: {name!r}: expected tensors that are equal or apart, got one that overlaps {other!r}. "
                    "Save a copy of it with .clone()."
                )
        spans[storage].append((begin, end, name))
    return tied
