"""One safetensors file: validate its header, read its tensors' bytes by offset, build a header to write.

Format (huggingface/safetensors README): 8 bytes, little-endian, the header's length N; N bytes of JSON, one entry
per tensor with dtype, shape and the begin and end of its bytes; then the bytes, without gaps or overlaps.
"""

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from surgery.checkpoint.at_rest import Stamp, refuse_changed
from surgery.checkpoint.descriptors import Descriptor
from surgery.checkpoint.digests import recall, remember
from surgery.checkpoint.foreign_files import SAFETENSORS, foreign_file
from surgery.display import Brief
from surgery.dtypes import BITS
from surgery.errors import SourceError
from surgery.files import open_file
from surgery.io_errors import naming

_RANK = {dtype: rank for rank, dtype in enumerate(BITS)}

MAX_HEADER = 100_000_000
"""Bytes. safetensors refuses more, and so do we before reading that much."""


@dataclass(frozen=True, repr=False)
class Tensor(Brief):
    """One tensor of a file: its entry in the header, with begin and end as offsets in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, repr=False)
class Header(Brief):
    """A validated header: its exact bytes, length prefix included, and its tensors in the order of their bytes."""

    raw: bytes
    tensors: tuple[Tensor, ...]

    @property
    def file_size(self) -> int:
        return self.tensors[-1].end if self.tensors else len(self.raw)


class TensorFile:
    """Reads one safetensors file. The header is read when made; close() releases the file."""

    tied: dict[str, str] = {}
    """Names that repeat another tensor: the format cannot hold any."""

    def __init__(self, path: Path, *, label: str) -> None:
        self.path = path
        self._stamp = Stamp.of(path)
        self.header = read_header(path, label=label)
        self._descriptor = Descriptor(path, self._stamp)
        self._seek_lock = threading.Lock()
        with self._descriptor.use() as fd, naming(path):
            self._stat = os.fstat(fd)

    @property
    def descriptor(self) -> Descriptor:
        """Of the file."""
        return self._descriptor

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on.

        Raises:
            SourceError: the file has become shorter since its header was read.
        """
        done = 0
        while done < len(buffer):
            n = self._read_at(tensor.begin + start + done, buffer[done:])
            if n == 0:
                raise SourceError(
                    f"{self.path}: expected {tensor.end} bytes, got fewer. It changed while it was read; run again."
                )
            done += n

    def _read_at(self, position: int, buffer: memoryview) -> int:
        with self._descriptor.use() as fd, naming(self.path):
            return self._read(fd, position, buffer)

    def _read(self, fd: int, position: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(fd, [buffer], position)
        with self._seek_lock:  # Windows: the position is the descriptor's, and threads share that
            os.lseek(fd, position, os.SEEK_SET)
            data = os.read(fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def digest(self, algorithm: str) -> str | None:
        """Return the file's digest if it is known; else the reader hashes the bytes as they pass: they are the file."""
        return recall(self.path, algorithm)

    def settle(self, digest: str) -> None:
        """Check that the file is still what it was when opened, and remember its digest.

        Raises:
            SourceError: it is not.
        """
        self.refuse_changed()
        remember(self.path, digest, self._stat)

    def refuse_changed(self) -> None:
        """Refuse a file that has been removed, replaced or written to since it was opened.

        Raises:
            SourceError: it has.
        """
        refuse_changed(self.path, self._stamp)

    def close(self) -> None:
        self._descriptor.close()


def read_header(path: Path, *, label: str) -> Header:
    """Read and validate a safetensors header; safetensors' own parser has the last word.

    Args:
        label: the file's name in messages.
    Raises:
        SourceError: truncated, malformed, duplicate names, overlapping or missing ranges, unknown dtype.
    """
    size = path.stat().st_size
    with open_file(path) as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 0 < length <= min(size - 8, MAX_HEADER):
            raise foreign_file(path, label, SAFETENSORS) or SourceError(
                f"{label}: expected a safetensors header within its {size} bytes, got one of {length} bytes. "
                "The file is truncated or not safetensors; fetch it again."
            )
        raw = prefix + file.read(length)
    tensors = parse_header(raw, label=label)
    if tensors and tensors[-1].end != size:
        raise SourceError(
            f"{label}: expected {tensors[-1].end} bytes, as its header says, got {size}. "
            "The file is truncated or damaged; fetch it again."
        )
    try:
        with naming(path), safe_open(path, framework="numpy"):
            pass
    except FileNotFoundError as error:  # safetensors says so of any file that it cannot open
        with open_file(path):
            # no word on what the file holds: SourceError would be one
            raise OSError(f"{path}: expected a file to open, got an error that is gone by now. Run again.") from error
    except SafetensorError as error:
        raise SourceError(f"{label}: expected a valid safetensors file, got {error}. Fetch it again.") from error
    return Header(raw, tensors)


def parse_header(raw: bytes, *, label: str) -> tuple[Tensor, ...]:
    """Validate a header's bytes, length prefix included, and return its tensors in the order of their bytes.

    Args:
        label: the file's name in messages.
    Raises:
        SourceError: malformed, duplicate names, overlapping or missing ranges, unknown dtype.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise SourceError(f"{label}: expected each name once in the header, got {twice!r} twice. Fetch it again.")
        return entries

    try:
        entries = json.loads(raw[8:], object_pairs_hook=refuse_duplicates)
        entries.pop("__metadata__", None)
        return _parse_entries(entries, len(raw), label)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{label}: expected a JSON header of tensors, got a malformed one. Fetch it again."
        ) from error


def _parse_entries(entries: Mapping[str, Mapping[str, Any]], data_start: int, label: str) -> tuple[Tensor, ...]:
    """Validate entries and sort them by their bytes, which begin at `data_start`. Raises as what is no entry does."""
    tensors = [_tensor(name, entry, data_start, label) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = data_start
    for tensor in tensors:
        if tensor.begin != position:
            fault = "overlaps the one before it" if tensor.begin < position else "leaves a gap before it"
            raise SourceError(
                f"{label}: expected tensors back to back, got {tensor.name!r}, which {fault}. Fetch it again."
            )
        position = tensor.end
    return tuple(tensors)


def _tensor(name: str, entry: Mapping[str, Any], data_start: int, label: str) -> Tensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in BITS:
        raise SourceError(f"{label}: {name!r}: expected a safetensors dtype, got {dtype!r}. Fetch it again.")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise SourceError(f"{label}: {name!r}: expected whole, positive numbers for shape and range. Fetch it again.")
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise SourceError(
            f"{label}: {name!r}: expected {math.prod(shape) * BITS[dtype] // 8} bytes for {dtype} {list(shape)}, "
            f"got {end - begin}. Fetch it again."
        )
    return Tensor(name, dtype, shape, data_start + begin, data_start + end)


def build_header(entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """Lay out a new file the way safetensors does: by dtype, widest first, then by name, so that tensors are aligned.

    Args:
        entries: (name, dtype, shape) of each tensor.
        metadata: the file's `__metadata__`.
    """
    ordered = sorted(entries, key=lambda entry: (-_RANK[entry[1]], entry[0]))
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in ordered:
        end = position + math.prod(shape) * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    body = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    raw = len(body).to_bytes(8, "little") + body
    return Header(raw, parse_header(raw, label="new file"))
