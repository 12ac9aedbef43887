"""One safetensors file of block-scaled weights, read as if it held them in bfloat16."""

import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from surgery.checkpoint.block_scaled import FLOAT8, Float8Blocks, Mxfp4Blocks, ReadBytes, block_of
from surgery.checkpoint.descriptors import Descriptor
from surgery.checkpoint.digests import algorithm_of, digest_of
from surgery.checkpoint.packed_names import BLOCKS, SCALE, SCALES, is_scale, weight_of
from surgery.checkpoint.tensorfile import Header, Tensor, TensorFile, build_header
from surgery.dtypes import is_measurable, storage, to_numbers
from surgery.errors import SourceError

_Decoder = Float8Blocks | Mxfp4Blocks


class DequantizedFile:
    """Reads a file of float8 or mxfp4 through the interface of TensorFile; its header is the one of the file to write.

    Args:
        others: the other files of the model, in which scales may be.
        block: rows and columns of float8's blocks, as the config says.
    Raises:
        SourceError: malformed, or a scale is missing.
    """

    tied: dict[str, str] = {}
    """Names that repeat another tensor: the format cannot hold any."""
    descriptor: Descriptor | None = None
    """The bytes do not lie in the file."""

    def __init__(self, path: Path, others: Sequence[Path], *, block: tuple[int, int] | None) -> None:
        self._path, self._others, self._block = path, others, block
        with ExitStack() as opened:
            self._files = [opened.enter_context(closing(TensorFile(path, label=str(path))))]
            self._stored = {tensor.name: (self._files[0], tensor) for tensor in self._files[0].header.tensors}
            self._elsewhere: dict[str, tuple[TensorFile, Tensor]] = {}
            weights = [name for name, (_, tensor) in self._stored.items() if not is_scale(tensor)]
            decoders = {name: self._decoder(name, opened) for name in weights}
            self._refuse_left_scales(opened)
            self._opened = opened.pop_all()
        self._decoders = {_plain_name(decoder): decoder for decoder in decoders.values() if decoder}
        entries = [(name, "BF16", decoder.shape) for name, decoder in self._decoders.items()]
        plain = [self._stored[name][1] for name, decoder in decoders.items() if decoder is None]
        entries += [(tensor.name, tensor.dtype, tensor.shape) for tensor in plain]
        self.header: Header = build_header(entries, {"format": "pt"})

    def _decoder(self, name: str, opened: ExitStack) -> _Decoder | None:
        """Return what decodes a tensor, or None if it is not quantized."""
        file, tensor = self._stored[name]
        if tensor.dtype in FLOAT8:
            scale_file, scale = self._find(name + SCALE, name, opened)
            numbers = _numbers(scale_file, scale)
            block = block_of(tensor, scale.shape, self._block, f"{self._path}: {name!r}")
            grid = scale.shape if len(scale.shape) > 1 else (1, 1)
            return Float8Blocks(tensor, partial(_read, file, tensor), numbers.reshape(1, *grid), block)
        if _is_decoded(tensor):
            scale_file, scale = self._find(name.removesuffix(BLOCKS) + SCALES, name, opened)
            if scale.shape != tensor.shape[:-1] or tensor.shape[-1] != 16 or len(tensor.shape) < 3:
                raise SourceError(
                    f"{self._path}: {name!r}: expected blocks of 16 bytes with a scale each, got {list(tensor.shape)} "
                    f"and {list(scale.shape)} scales. Fetch the checkpoint again."
                )
            return Mxfp4Blocks(
                tensor, _Latest(partial(_read, file, tensor)), _Latest(partial(_read, scale_file, scale))
            )
        return None

    def _find(self, name: str, weight: str, opened: ExitStack) -> tuple[TensorFile, Tensor]:
        """Return a scale and its file, which may be another one of the model."""
        if found := self._locate(name, opened):
            return found
        raise SourceError(
            f"{self._path}: {weight!r}: expected its scales, {name!r}, in the checkpoint, got none. Fetch it again."
        )

    def _locate(self, name: str, opened: ExitStack) -> tuple[TensorFile, Tensor] | None:
        if name not in self._stored and len(self._files) == 1:
            for path in self._others:
                file = opened.enter_context(closing(TensorFile(path, label=str(path))))
                self._files.append(file)
                self._elsewhere |= {tensor.name: (file, tensor) for tensor in file.header.tensors}
        return self._stored.get(name) or self._elsewhere.get(name)

    def _refuse_left_scales(self, opened: ExitStack) -> None:
        """Refuse scales that nothing is multiplied by: they are not written, and what they are for would be wrong."""
        for _, scale in self._stored.values():
            if not is_scale(scale):
                continue
            weight = weight_of(scale)
            found = self._locate(weight, opened)
            if found is None or not _is_decoded(found[1]):
                raise SourceError(
                    f"{self._path}: {scale.name!r}: expected {weight!r} in float8 or mxfp4 with it, got "
                    f"{found[1].dtype if found else 'none'}. Perturb the original checkpoint instead."
                )

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on.

        Raises:
            SourceError: the file has become shorter since its header was read.
        """
        decoder = self._decoders.get(tensor.name)
        if decoder is None:
            file, stored = self._stored[tensor.name]
            file.read_into(stored, start, buffer)
            return
        first, end = start // 2, -(-(start + len(buffer)) // 2)
        data = decoder.values(first, end - first).view(torch.uint8).numpy()
        np.copyto(np.frombuffer(buffer, np.uint8), data[start - 2 * first :][: len(buffer)])

    def digest(self, algorithm: str) -> str | None:
        """Hash the file: its bytes are not those that pass when its tensors are read."""
        return digest_of(self._path, algorithm)

    def settle(self, digest: str) -> None:
        """Check that the file is still what it was when opened.

        Raises:
            SourceError: it is not.
        """
        self.refuse_changed()
        if digest != self.digest(algorithm_of(digest)):
            raise SourceError(
                f"{self._path}: expected a file at rest, got one that changed while it was read. Run again."
            )

    def refuse_changed(self) -> None:
        """Refuse a file that has been removed, replaced or written to since it was opened, or one with its scales.

        Raises:
            SourceError: it has.
        """
        for file in self._files:
            file.refuse_changed()

    def close(self) -> None:
        self._opened.close()


def _is_decoded(tensor: Tensor) -> bool:
    return tensor.dtype in FLOAT8 or (tensor.dtype == "U8" and tensor.name.endswith(BLOCKS))


def _plain_name(decoder: _Decoder) -> str:
    name = decoder.stored.name
    return name.removesuffix(BLOCKS) if isinstance(decoder, Mxfp4Blocks) else name


class _Latest:
    """Reads bytes, and keeps what it has read last: the pieces of one matrix want all of it, one after the other."""

    def __init__(self, read: ReadBytes) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._place: tuple[int, int] | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def __call__(self, start: int, count: int) -> torch.Tensor:
        with self._lock:
            if self._place != (start, count):
                self._bytes, self._place = self._read(start, count), (start, count)
            return self._bytes


def _read(file: TensorFile, tensor: Tensor, start: int, count: int) -> torch.Tensor:
    data = np.empty(count, np.uint8)
    file.read_into(tensor, start, data.data)
    return torch.from_numpy(data)


def _numbers(file: TensorFile, scale: Tensor) -> torch.Tensor:
    """Return scales as float32; bytes are powers of two, as F8_E8M0 is."""
    dtype = "F8_E8M0" if scale.dtype == "U8" else scale.dtype
    if not is_measurable(dtype):
        raise SourceError(f"{file.path}: {scale.name!r}: expected numbers, got {scale.dtype}. Fetch it again.")
    values, _ = to_numbers(storage(_read(file, scale, 0, scale.nbytes).numpy().data, dtype), dtype)
    return torch.from_numpy(values.astype(np.float32)).reshape(scale.shape)
