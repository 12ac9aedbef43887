"""Mutated safetensors files: TensorFile against safe_open."""

import math
from pathlib import Path
from random import Random
from typing import Any

from mutations import mutate_bytes, mutate_json, spell_json
from outcomes import FindingError, Refused, same, stricter
from safetensors import deserialize, safe_open

from surgery.checkpoint.tensorfile import TensorFile
from surgery.dtypes import BITS

STRICTER = {
    "a name twice": "expected each name once in the header",
}
"""What surgery refuses and safe_open reads: rule, and its words."""

_NAMES = ("w", "a.b", "layer.0.weight", "é", "\x1b[31m", "", "__metadata__x", "日本", '"\\')
_METADATA = ({}, {"format": "pt"}, {"a": "b", "é": "日本"})
_DTYPES = (*BITS, "F32", "F32", "BF16", "F16")


def file_of(r: Random) -> tuple[dict[str, Any], int]:
    """Return a sound header, and how many bytes follow it."""
    table: dict[str, Any] = {"__metadata__": r.choice(_METADATA)} if r.random() < 0.5 else {}
    begin = 0
    for number in range(r.randint(0, 4)):
        dtype, shape = r.choice(_DTYPES), [r.randint(0, 4) for _ in range(r.randint(0, 3))]
        if math.prod(shape) * BITS[dtype] % 8:
            shape.append(8)
        end = begin + math.prod(shape) * BITS[dtype] // 8
        table[f"{r.choice(_NAMES)}{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return table, begin


def _move_ranges(r: Random, table: dict[str, Any]) -> None:
    """Have ranges of the right size overlap, or leave holes."""
    for name, entry in table.items():
        if name != "__metadata__" and r.random() < 0.5:
            by = r.choice((-8, -4, -1, 1, 4, 8, 64))
            entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def mutated_file(r: Random) -> bytes:
    table, size = file_of(r)
    if r.random() < 0.1:
        _move_ranges(r, table)
    elif r.random() < 0.8:
        table = mutate_json(r, table)
    header = spell_json(r, table)
    if r.random() < 0.2:
        header = r.choice((b" ", b"\n", b"\0", b"")) + header + r.choice((b" " * 7, b"\t", b"\0", b"{}", b"\n"))
    length = len(header)
    if r.random() < 0.08:
        length = r.choice((0, 1, length + 1, length - 1, length ^ 8, length + 2**32, 10**8, 10**8 + 1, 2**64 - 1))
    size = max(0, size + r.choice((-4, -1, 1, 8))) if r.random() < 0.08 else size
    data = max(length, 0).to_bytes(8, "little") + header + r.randbytes(size)
    return mutate_bytes(r, data) if r.random() < 0.1 else data


class Headers:
    def __init__(self, folder: Path) -> None:
        self._path = folder / "x.safetensors"

    def write(self, r: Random) -> None:
        self._path.write_bytes(mutated_file(r))

    def read(self) -> dict[str, Any]:
        file = TensorFile(self._path, label="x")
        try:
            found = {}
            for tensor in file.header.tensors:
                data = bytearray(tensor.nbytes)
                file.read_into(tensor, 0, memoryview(data))
                found[tensor.name] = (tensor.dtype, list(tensor.shape), bytes(data))
            return found
        finally:
            file.close()

    def judge(self, ours: Any) -> str:
        theirs = self._oracle()
        if isinstance(theirs, Refused):
            if not isinstance(ours, Refused):
                raise FindingError(f"read what its oracle refuses: {theirs.message:.200}")
            return "both refuse"
        if isinstance(ours, Refused):
            return stricter(ours, STRICTER)
        same(ours, theirs)
        return "both read"

    def _oracle(self) -> Any:
        try:
            with safe_open(self._path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                kinds = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
            contents = {name: bytes(entry["data"]) for name, entry in deserialize(self._path.read_bytes())}
        except Exception as error:
            return Refused(f"{type(error).__name__}: {error}")
        return {name: (*kind, contents[name]) for name, kind in kinds.items()}
