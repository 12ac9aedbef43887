"""Llama's own consolidated.00.pth, consolidated.01.pth, ...: model-parallel cuts of the same tensors, put together.

Meta's layers hold in each rank some rows of a weight (ColumnParallelLinear, VocabParallelEmbedding), some columns
(RowParallelLinear, ParallelEmbedding), or a copy of what is not cut. params.json tells the sizes of the whole.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from surgery.checkpoint.boxes import Box, copy_bytes
from surgery.checkpoint.pickles import PickleFile
from surgery.checkpoint.several_files import SeveralFiles
from surgery.checkpoint.tensorfile import Header, Tensor, build_header
from surgery.errors import SourceError, some
from surgery.files import read_file

_PARAMS = "params.json"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Cut(NamedTuple):
    """How ranks hold a weight.

    Args:
        names: a pattern.
        dim: that is cut; None: every rank has a copy.
        sizes: of the whole, each a number of params.json; "" is not told there.
    """

    names: str
    dim: int | None
    sizes: tuple[str, ...]


_MLP = r"layers\.\d+\.feed_forward(?:\.experts\.\d+)?"
_CUTS = (
    _Cut(r"layers\.\d+\.attention\.wq\.weight", 0, ("heads", "dim")),
    _Cut(r"layers\.\d+\.attention\.w[kv]\.weight", 0, ("kv_heads", "dim")),
    _Cut(r"layers\.\d+\.attention\.wo\.weight", 1, ("dim", "heads")),
    _Cut(rf"{_MLP}\.w[13]\.weight", 0, ("", "dim")),
    _Cut(rf"{_MLP}\.w2\.weight", 1, ("dim", "")),
    _Cut(r"output\.weight", 0, ("vocab", "dim")),
    _Cut(r"(?:layers\.\d+\.(?:attention|ffn)_)?norm\.weight", None, ("dim",)),
    _Cut(r"rope\.freqs", None, ("",)),
)
_EMBEDDING = "tok_embeddings.weight"


class ConsolidatedFile(SeveralFiles):
    """Reads consolidated shards as one file; its header is the one of the safetensors to write.

    Args:
        paths: of the shards, in the order of their ranks.
        key: which state_dict to take of each, where there are several.
    Raises:
        SourceError: a shard or params.json cannot be read, or they do not fit together.
    """

    def __init__(self, paths: Sequence[Path], *, key: str | None = None) -> None:
        super().__init__(paths)
        self._shards = [PickleFile(path, label=str(path), key=key) for path in paths]
        for shard in self._shards[1:]:
            _refuse_others(self._shards[0], shard)
        sizes = _read_sizes(paths[0].with_name(_PARAMS))
        self.tied = self._shards[0].tied
        self._cuts = {tensor.name: _cut_of(tensor, sizes, paths[0]) for tensor in self._shards[0].header.tensors}
        entries = [(tensor.name, tensor.dtype, self._whole(tensor, sizes)) for tensor in self._shards[0].header.tensors]
        self.header: Header = build_header(entries, {"format": "pt"})

    def _whole(self, tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return a tensor's whole shape; refuse one that params.json does not tell, and copies that differ."""
        cut = self._cuts[tensor.name]
        whole = tuple(size * (len(self._shards) if i == cut.dim else 1) for i, size in enumerate(tensor.shape))
        expected = [sizes.get(name, 0) for name in cut.sizes]
        if len(whole) != len(expected) or any(n and n != size for n, size in zip(expected, whole, strict=True)):
            told = ", ".join(str(n or "any") for n in expected)
            raise SourceError(
                f"{self._shards[0].path}: {tensor.name!r}: expected [{told}], as {_PARAMS} has it, got {list(whole)} "
                f"of {len(self._shards)} shards. Fetch the missing shards, or the right {_PARAMS}."
            )
        if cut.dim is None:
            self._refuse_unequal(tensor.name)
        return whole

    def _refuse_unequal(self, name: str) -> None:
        first = _bits(self._shards[0].tensors[name])
        for shard in self._shards[1:]:
            if not np.array_equal(first, _bits(shard.tensors[name])):
                raise SourceError(
                    f"{shard.path}: {name!r}: expected a copy of {self._shards[0].path.name}'s, got other values. "
                    "Fetch the shards of one checkpoint."
                )

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the whole tensor's bytes from `start` on."""
        self.refuse_cut()
        dim = self._cuts[tensor.name].dim
        shards = self._shards[:1] if dim is None else self._shards
        parts = [_bits(shard.tensors[tensor.name]) for shard in shards]
        boxes: list[Box] = []
        for rank, part in enumerate(parts):
            offset = tuple(rank * n if i == dim else 0 for i, n in enumerate(part.shape))
            boxes.append((offset, part))
        copy_bytes(boxes, tensor.shape, start, buffer)

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's elements as integers; NumPy knows no bfloat16."""
    bits: np.ndarray = tensor.view(_INTEGERS[tensor.element_size()]).numpy()
    return bits


def _refuse_others(first: PickleFile, shard: PickleFile) -> None:
    """Refuse a shard with other names, dtypes or shapes than the first."""
    mine, theirs = ({tensor.name: tensor for tensor in file.header.tensors} for file in (first, shard))
    if mine.keys() != theirs.keys():
        names = sorted(map(repr, mine.keys() ^ theirs.keys()))
        raise SourceError(
            f"{shard.path}: expected the names of {first.path.name}, got {len(names)} in only one of the two "
            f"({some(names)}). Fetch the shards of one checkpoint."
        )
    for name, tensor in mine.items():
        other = theirs[name]
        if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            raise SourceError(
                f"{shard.path}: {name!r}: expected {tensor.dtype} {list(tensor.shape)}, as {first.path.name} has it, "
                f"got {other.dtype} {list(other.shape)}. Fetch the shards of one checkpoint."
            )


def _cut_of(tensor: Tensor, sizes: Mapping[str, int], path: Path) -> _Cut:
    if tensor.name == _EMBEDDING:  # Llama 1 and 2 cut its columns, Llama 3 its rows
        return _Cut(_EMBEDDING, int(tensor.shape[-1:] != (sizes["dim"],)), ("vocab", "dim"))
    if cut := next((cut for cut in _CUTS if re.fullmatch(cut.names, tensor.name)), None):
        return cut
    raise SourceError(
        f"{path}: {tensor.name!r}: expected a name of Llama's, whose cut into shards is known, got another. "
        "Join the shards into one file first."
    )


def _read_sizes(path: Path) -> dict[str, int]:
    """Return the sizes that params.json tells, by the names in _CUTS."""
    try:
        params = json.loads(read_file(path))
        dim, heads = int(params["dim"]), int(params.get("n_heads") or 0)
        head = int(params.get("head_dim") or (dim // heads if heads else 0))
        kv_heads = int(params.get("n_kv_heads") or heads)
        vocab = max(0, int(params.get("vocab_size") or 0))  # -1: the tokenizer knows
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{path}: expected the sizes of the shards beside it, such as dim, got none. Fetch it too."
        ) from error
    return {"dim": dim, "heads": heads * head, "kv_heads": kv_heads * head, "vocab": vocab}
