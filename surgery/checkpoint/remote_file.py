"""One safetensors file on an object store, read by ranges: header first, then tensors, never the whole of it.

Nothing is read ahead here: each of several threads reads its own piece, and so far ahead of the others.
"""

import threading
from collections import OrderedDict

from surgery.checkpoint.remote import RemoteFiles
from surgery.checkpoint.remote_digests import recall_remote, remember_remote
from surgery.checkpoint.tensorfile import MAX_HEADER, Header, Tensor, parse_header
from surgery.errors import SourceError

_FIRST = 100_000  # bytes; most headers are shorter, and take one request
_BLOCK = 1 << 16  # bytes that are read where a few are asked for: others beside them are asked for next
_KEPT = 32  # blocks


class RemoteFile:
    """Reads one safetensors file of a store. May be used by several threads at once.

    Raises:
        SourceError: it is no safetensors, or malformed.
    """

    tied: dict[str, str] = {}
    descriptor = None
    """It is no file of this machine."""

    def __init__(self, files: RemoteFiles, name: str, *, label: str) -> None:
        self._files = files
        self._name = name
        self._label = label
        self._size = files.entries[name].size
        self.header = self._read_header()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def _read_header(self) -> Header:
        raw = self._read(0, min(_FIRST, self._size))
        length = int.from_bytes(raw[:8], "little")
        if len(raw) < 8 or not 0 < length <= min(self._size - 8, MAX_HEADER):
            raise SourceError(
                f"{self._label}: expected a safetensors header within its {self._size} bytes, got one of {length} "
                "bytes. The file is truncated or not safetensors; upload it again."
            )
        raw = (raw + self._read(len(raw), max(len(raw), 8 + length)))[: 8 + length]
        header = Header(raw, parse_header(raw, label=self._label))
        if header.tensors and header.file_size != self._size:
            raise SourceError(
                f"{self._label}: expected {header.file_size} bytes, as its header says, got {self._size}. "
                "The file is truncated or damaged; upload it again."
            )
        return header

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""
        self.read_at(tensor.begin + start, buffer)

    def read_at(self, position: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `position` on."""
        end = position + len(buffer)
        if len(buffer) > _BLOCK:
            buffer[:] = self._read(position, end)
            return
        for first in range(position // _BLOCK * _BLOCK, end, _BLOCK):
            low, high = max(position, first), min(end, first + _BLOCK)
            buffer[low - position : high - position] = self._block(first)[low - first : high - first]

    def _block(self, first: int) -> bytes:
        with self._lock:
            if first in self._blocks:
                self._blocks.move_to_end(first)
                return self._blocks[first]
        block = self._read(first, min(first + _BLOCK, self._size))
        with self._lock:
            self._blocks[first] = block
            while len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        return block

    def _read(self, start: int, stop: int) -> bytes:
        return self._files.store.read(self._name, start, stop)

    def digest(self, algorithm: str) -> str | None:
        """Return the file's digest if it is known of this version of it; else the bytes are hashed as they pass."""
        return recall_remote(self._files, self._name, algorithm)

    def settle(self, digest: str) -> None:
        """Check that the file is still what it was when it was listed, and remember its digest.

        Raises:
            SourceError: it is not.
        """
        self.refuse_changed()
        remember_remote(self._files, self._name, digest)

    def refuse_changed(self) -> None:
        """Refuse a file that has been removed or written anew since it was listed.

        Raises:
            SourceError: it has.
        """
        self._files.refuse_changed(self._name)

    def close(self) -> None:
        """Release what is kept of it."""
        self._blocks.clear()
