"""Mutated PyTorch archives: PickleFile against torch.load(weights_only=True)."""

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from archives import mutated_checkpoint
from outcomes import FindingError, Refused, same, stricter

from surgery.checkpoint.pickles import DTYPES, PickleFile

STRICTER = {
    "tensors that overlap": "expected tensors that are equal or apart",
    "an element repeated to gigabytes": "expected a tensor of elements of its own",
    "a name of FSDP 1": "those that FSDP has flattened",
    "a name that safetensors cannot hold": "expected a name that safetensors can hold",
    "no tensors": "expected a state_dict",
    "storages that are not brought along": "expected a PyTorch checkpoint with the bytes of all its tensors",
    "a deflated record that Python cannot read": "expected a record that can be read",
    "an archive that Python cannot list": "expected an archive with a list of its records",
    "a pickle before 1.6 that Python refuses": "expected pickles as torch before 1.6 wrote them",
    "a size below zero": "expected whole, positive numbers",
}
"""What surgery refuses of the plain state_dicts that torch.load reads: rule, and its words."""

_M_PERTURB, _FILL = -6, 0xA5  # glibc's mallopt: fresh memory holds this byte, inverted
_UNREAD = bytes([_FILL ^ 0xFF]) * 8
_MOST_READ = 1 << 22  # bytes of a tensor that are compared; an expanded one may have very many


class Pickles:
    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self._path = folder / "x.bin"

    def write(self, r: Random) -> None:
        self._path.write_bytes(mutated_checkpoint(r))

    def read(self) -> dict[str, Any]:
        file = PickleFile(self._path, label="x")
        found: dict[str, Any] = {}
        for tensor in file.header.tensors:
            data = bytearray(min(tensor.nbytes, _MOST_READ))
            if 0 < tensor.nbytes == len(data):
                file.read_into(tensor, 0, memoryview(data))
            found[tensor.name] = (tensor.dtype, list(tensor.shape), bytes(data))
        found |= {name: found[kept] for name, kept in file.tied.items()}
        file.close()
        return found

    def judge(self, ours: Any) -> str:
        theirs = self._oracle()
        is_plain = isinstance(theirs, Mapping) and all(_is_plain(*item) for item in theirs.items())
        if isinstance(ours, Refused):
            if isinstance(theirs, Refused):
                return "both refuse"
            if is_plain and isinstance(_in_filled_memory(self._oracle), Refused):
                return "refused: its oracle reads what was in memory"
            return stricter(ours, STRICTER) if is_plain else "refused: no plain state_dict"
        if isinstance(theirs, Refused):
            raise FindingError(f"read what its oracle refuses: {theirs.message:.200}")
        contents = {name: _contents(tensor) for name, tensor in _named(theirs, ours)}
        if ours != contents and self._oracle_reads_nothing(ours):
            return "both read: its oracle what was in memory"
        same(ours, contents)
        return "both read" if is_plain else "both read: a nest"

    def _oracle_reads_nothing(self, ours: Any) -> bool:
        """Tell whether torch.load returns memory that it never wrote, of which surgery's must hold none."""
        if _in_filled_memory(self.read) != ours:
            raise FindingError("holds what was in memory")
        tensors = _named(_in_filled_memory(self._oracle), ours)
        return any(_UNREAD in _contents(tensor)[2] for _, tensor in tensors)

    def _oracle(self) -> Any:
        try:
            return torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:
            return Refused(f"{type(error).__name__}: {error}")


def _in_filled_memory(read: Callable[[], Any]) -> Any:
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_PERTURB, _FILL)
    try:
        return read()
    finally:
        mallopt(_M_PERTURB, 0)


def _is_plain(name: Any, value: Any) -> bool:
    return isinstance(name, str) and type(value) in (torch.Tensor, torch.nn.Parameter) and value.dtype in DTYPES


def _named(loaded: Any, names: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of the one mapping that has all of these names."""
    if not isinstance(loaded, Mapping):
        return []
    if names.keys() <= loaded.keys():
        return [(name, tensor) for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)]
    return next((found for value in loaded.values() if (found := _named(value, names))), [])


def _contents(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    size = min(tensor.nbytes, _MOST_READ)
    data = bytes(size)
    if 0 < tensor.nbytes == size:
        flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
        data = flat.view(torch.uint8).numpy().tobytes()
    return DTYPES[tensor.dtype], list(tensor.shape), data
