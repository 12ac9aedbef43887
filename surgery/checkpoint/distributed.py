"""torch.distributed checkpoints (DCP): tensors put together from the chunks that ranks wrote, by .metadata.

A chunk is what torch.save wrote of one tensor, somewhere in a .distcp file. torch.load tells its shape and strides,
to the meta device and with weights_only=True; its bytes are mapped, so that only what is asked for is read.
"""

import io
import sys
import threading
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from surgery.checkpoint.boxes import Box, copy_bytes, cover_fault
from surgery.checkpoint.distributed_metadata import Chunk, StoredTensor, read_metadata
from surgery.checkpoint.pickle_records import LOCAL_HEADER, begin_of
from surgery.checkpoint.pickles import DTYPES
from surgery.checkpoint.several_files import SeveralFiles
from surgery.checkpoint.state_dicts import find_state_dict
from surgery.checkpoint.tensorfile import Header, Tensor, build_header
from surgery.errors import SourceError


class DistributedFile(SeveralFiles):
    """Reads a DCP folder as one file; its header is the one of the safetensors to write.

    Args:
        paths: .metadata, and the .distcp files beside it.
        key: which state_dict to take, where there are several.
    Raises:
        SourceError: a file is missing, damaged or hostile, or the chunks do not make up whole tensors.
    """

    tied: dict[str, str] = {}
    """Names that repeat another tensor: DCP writes each."""

    def __init__(self, paths: Sequence[Path], *, key: str | None = None) -> None:
        super().__init__(paths)
        self._path = paths[0]
        self._files = {path.name: path for path in paths[1:]}
        self._maps: dict[str, np.ndarray] = {}
        self._boxes: dict[str, list[Box]] = {}
        self._lock = threading.Lock()
        metadata = read_metadata(self._path)
        stored = {id(tensor.placeholder): tensor for tensor in metadata.tensors}
        chosen = find_state_dict(metadata.nest, str(self._path.parent), key=key)
        self._stored = {name: stored[id(placeholder)] for name, placeholder in chosen.items()}
        for name, tensor in self._stored.items():
            self._check(name, tensor)
        entries = [(name, DTYPES[t.placeholder.dtype], tuple(t.placeholder.shape)) for name, t in self._stored.items()]
        self.header: Header = build_header(entries, {"format": "pt"})

    def _check(self, name: str, tensor: StoredTensor) -> None:
        """Refuse a tensor whose chunks are not all there."""
        label = f"{self._path}: {name!r}"
        if tensor.placeholder.dtype not in DTYPES:
            raise SourceError(f"{label}: expected a plain dtype, got {tensor.placeholder.dtype}. Convert it first.")
        shape = tuple(tensor.placeholder.shape)
        if fault := cover_fault(shape, [(chunk.offset, chunk.size) for chunk in tensor.chunks]):
            raise SourceError(f"{label}: expected chunks that make up {list(shape)}, got {fault}. Save it again.")
        for chunk in tensor.chunks:
            path = self._files.get(chunk.file)
            if path is None:
                raise SourceError(f"{label}: expected {chunk.file} beside it, got no such file. Fetch it too.")
            if (size := path.stat().st_size) < chunk.start + chunk.length:
                raise SourceError(
                    f"{path}: expected at least {chunk.start + chunk.length} bytes, as .metadata says, got {size}. "
                    "The file is truncated; fetch it again."
                )

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the whole tensor's bytes from `start` on.

        Raises:
            SourceError: a chunk is damaged, or a file has become shorter.
        """
        self.refuse_cut()
        with self._lock:
            if tensor.name not in self._boxes:
                stored = self._stored[tensor.name]
                self._boxes[tensor.name] = [self._open_chunk(chunk, stored.placeholder) for chunk in stored.chunks]
        copy_bytes(self._boxes[tensor.name], tensor.shape, start, buffer)

    def _open_chunk(self, chunk: Chunk, tensor: torch.Tensor) -> Box:
        path = self._files[chunk.file]
        try:
            if chunk.file not in self._maps:
                self._maps[chunk.file] = _map(path)
            return chunk.offset, _view_chunk(self._maps[chunk.file], chunk, tensor.dtype)
        except OSError:
            raise
        except Exception as error:  # bytes that are no pickle make the unpickler raise anything
            raise SourceError(
                f"{path}: expected {DTYPES[tensor.dtype]} {list(chunk.size)} at byte {chunk.start}, as torch.save "
                "writes it, got another thing. The file is damaged; fetch it again."
            ) from error

    def close(self) -> None:
        self._boxes, self._maps = {}, {}


def _map(path: Path) -> np.ndarray:
    """Map a file without a descriptor, which np.memmap keeps: a tensor may be in the files of hundreds of ranks."""
    try:
        size = path.stat().st_size
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError:  # larger than memory, of which Linux may not promise that much
        return np.memmap(path, np.uint8, "r")


def _view_chunk(file: np.ndarray, chunk: Chunk, dtype: torch.dtype) -> np.ndarray:
    """Return a chunk's elements as integers, where they are; NumPy knows no bfloat16. Raises anything."""
    data = file[chunk.start : chunk.start + chunk.length]
    with warnings.catch_warnings(action="ignore"):
        saved = torch.load(io.BufferedReader(_Bytes(data)), map_location="meta", weights_only=True)
    if type(saved) is not torch.Tensor or (saved.dtype, tuple(saved.shape)) != (dtype, chunk.size):
        raise ValueError("another tensor")
    record = _record(data)
    if len(record) != saved.untyped_storage().nbytes():
        raise ValueError("another size")
    width = dtype.itemsize
    strides = [stride * width for stride in saved.stride()]
    return np.ndarray(chunk.size, f"<u{width}", record, saved.storage_offset() * width, strides)


def _record(data: np.ndarray) -> np.ndarray:
    """Return the bytes of the one storage in what torch.save wrote."""
    with zipfile.ZipFile(_Bytes(data)) as archive:
        (entry,) = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[0].endswith("/data")]
        order = [name for name in archive.namelist() if name.endswith("/byteorder")]
        if entry.compress_type or any(archive.read(name).decode() != sys.byteorder for name in order):
            raise ValueError("no plain bytes")
    begin = begin_of(entry, data[entry.header_offset :][:LOCAL_HEADER].tobytes())
    if begin is None:
        raise ValueError("no header")
    return data[begin : begin + entry.file_size]


class _Bytes(io.RawIOBase):
    """Bytes of an array as a file to read, without a copy of them."""

    def __init__(self, data: np.ndarray) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._data[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece.tobytes()
        self._position += len(piece)
        return len(piece)
