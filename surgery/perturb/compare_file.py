"""Where `verify` streams a shard in place of a file to write: its bytes are compared with those on the disk."""

import json
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from surgery.checkpoint.tensorfile import Header, Tensor
from surgery.checkpoint.weight_file import RangeReader, WeightFile
from surgery.display import Brief
from surgery.dtypes import BITS, storage, to_numbers
from surgery.errors import some
from surgery.perturb.partfile import place_in

_CHUNK = 1 << 18  # bytes at a time
_RUN = 1 << 15  # elements at a time: their values stay in a core's cache


@dataclass(repr=False)
class TensorMismatch(Brief):
    """How one tensor differs from what it should be.

    Args:
        elements: how many it has.
        differing: how many of them differ in any bit; -0 and 0 do, equal NaNs do not.
        not_finite: how many of those are NaN or Inf.
        max_abs: largest |d| of the others; None if there are none.
        std: of the source tensor, if it was measured.
    """

    file: str
    name: str
    dtype: str
    elements: int
    differing: int = 0
    not_finite: int = 0
    max_abs: float | None = None
    std: float | None = None

    @property
    def max_over_std(self) -> float | None:
        return self.max_abs / self.std if self.max_abs is not None and self.std else None

    def add(self, expected: memoryview, found: memoryview) -> None:
        """Take in a piece in which some bytes differ."""
        mine, theirs = (np.frombuffer(data, f"<u{BITS[self.dtype] // 8}") for data in (expected, found))
        for start in range(0, mine.size, _RUN):
            self._add(mine[start : start + _RUN], theirs[start : start + _RUN])

    def _add(self, expected: np.ndarray, found: np.ndarray) -> None:
        chosen = expected != found
        mine, theirs = (_numbers(bits[chosen], self.dtype) for bits in (expected, found))
        self.differing += mine.size
        self.not_finite += int((~np.isfinite(theirs)).sum())
        with np.errstate(invalid="ignore", over="ignore"):
            d = np.abs(theirs - mine)
        if (finite := d[np.isfinite(d)]).size:
            self.max_abs = max(self.max_abs or 0.0, float(finite.max()))


def _is_equal(a: memoryview, b: memoryview) -> bool:
    """Compare bytes, eight at a time."""
    whole = len(a) // 8 * 8
    one, other = (np.frombuffer(data[:whole], np.uint64) for data in (a, b))
    return a[whole:] == b[whole:] and np.array_equal(one, other)


def _numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Return the values of elements in float64, or complex, of any dtype that `surgery perturb` lets pass."""
    if dtype == "C64":
        return bits.view(np.complex64)
    return to_numbers(storage(bits.data, dtype), dtype)[0].astype(np.float64)


class FileComparison:
    """Takes the bytes that a file should hold, front to back, and compares them with those that it holds.

    Where its header is another, each tensor is compared with the one of its name, dtype and shape.

    Args:
        file: what is compared, which `close` closes.
        name: its name in faults.
        header: the one that it should have.
    """

    def __init__(self, file: WeightFile, name: str, header: Header) -> None:
        self.differences: dict[str, TensorMismatch] = {}
        self._name = name
        self._header = header
        self._file = file
        self._theirs = {tensor.name: tensor for tensor in self._file.header.tensors}
        self._ends = [tensor.end for tensor in header.tensors]
        self._lock = threading.Lock()

    def take(self, position: int, window: memoryview, nbytes: int) -> Callable[[], None]:
        """Take the next bytes: the header, which `faults` compares, or runs of tensors; return what compares them."""
        return partial(self._compare, place_in(window, position, nbytes), position)

    def _compare(self, data: memoryview, position: int) -> None:
        while data and position >= len(self._header.raw):
            tensor = self._header.tensors[bisect_right(self._ends, position)]
            n = min(tensor.end - position, len(data))
            self._compare_run(tensor, position - tensor.begin, data[:n])
            data, position = data[n:], position + n

    def _compare_run(self, tensor: Tensor, start: int, data: memoryview) -> None:
        theirs = self._theirs.get(tensor.name)
        if theirs is None or (theirs.dtype, theirs.shape) != (tensor.dtype, tensor.shape):
            return
        new = TensorMismatch(self._name, tensor.name, tensor.dtype, tensor.size)
        chunk = len(data) if isinstance(self._file, RangeReader) else _CHUNK
        buffer = np.empty(min(chunk, len(data)), np.uint8).data
        for done in range(0, len(data), chunk):
            expected = data[done : done + chunk]
            found = buffer[: len(expected)]
            self._file.read_into(theirs, start + done, found)
            if not _is_equal(expected, found):
                with self._lock:
                    self.differences.setdefault(tensor.name, new).add(expected, found)

    def close(self) -> None:
        self._file.close()

    def faults(self) -> list[str]:
        """Say what of the file's header is not as it should be.

        Raises:
            SourceError: the file was changed while it was compared.
        """
        self._file.refuse_changed()
        if self._file.header.raw == self._header.raw:
            return []
        mine = {tensor.name: tensor for tensor in self._header.tensors}
        faults = []
        if missing := [repr(name) for name in mine if name not in self._theirs]:
            faults.append(f"expected {len(missing)} tensors ({some(missing)}), got none of them.")
        if extra := [repr(name) for name in self._theirs if name not in mine]:
            faults.append(f"expected its source's tensors, got {len(extra)} others ({some(extra)}).")
        for name, tensor in mine.items():
            other = self._theirs.get(name, tensor)
            if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
                faults.append(f"{name!r}: expected {_kind(tensor)}, got {_kind(other)}.")
        if not faults and list(mine) != list(self._theirs):
            faults.append("expected its source's order of tensors, got another.")
        if _metadata(self._header) != _metadata(self._file.header):
            faults.append(f"expected metadata {_metadata(self._header)}, got {_metadata(self._file.header)}.")
        return [f"{self._name}: {fault}" for fault in faults or ["expected its source's header, got another spelling."]]


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _metadata(header: Header) -> object:
    return json.loads(header.raw[8:]).get("__metadata__")
