"""The .metadata of a torch.distributed checkpoint (DCP): a plain pickle, read without running anything in it.

torch's own reader hands it to pickle.load, which calls what a pickle names. Here each class that DCP writes stands for
a `_Record`, which keeps the fields it is given and does nothing, and every other name is refused.
"""

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from surgery.errors import SourceError
from surgery.files import open_file

_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # Python 3.13
    "builtins": ("getattr",),  # Python 3.11.0 to 3.11.3 write the members of an Enum with it
}


class _Record:
    """Stands for what DCP pickled as a class: `fields` is what was to be set in it."""

    fields: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.fields = state


_RECORDS = {(module, name): type(name, (_Record,), {}) for module, names in _CLASSES.items() for name in names}


class _ForeignNameError(Exception):
    """The pickle names what DCP does not write."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if record := _RECORDS.get((module, name)):
            return record
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise _ForeignNameError(f"{module}.{name}")


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, which torch.save wrote into a file.

    Args:
        offset, size: of the part, in the tensor.
        file: relative to the checkpoint.
        start, length: of the bytes that torch.save wrote.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and its chunks; `placeholder` is one of its dtype and shape on the meta device."""

    placeholder: torch.Tensor
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DistributedMetadata:
    """What a checkpoint holds.

    Args:
        nest: as it was given to dcp.save, with placeholders for tensors, and b"" for what is none.
        tensors: every one of them.
    """

    nest: dict[Any, Any]
    tensors: tuple[StoredTensor, ...]


def read_metadata(path: Path) -> DistributedMetadata:
    """Read a .metadata.

    Raises:
        SourceError: it calls what DCP does not, is damaged, names files out of its folder, or needs a transformation.
    """
    try:
        with open_file(path) as file:
            fields = _fields(_Unpickler(file).load(), "Metadata")
        return _parse(fields, path)
    except _ForeignNameError as error:
        raise SourceError(
            f"{path}: expected a pickle of nothing but DCP's metadata, got one that calls {error}. "
            "It was not run; do not trust this checkpoint."
        ) from error
    except (OSError, SourceError):
        raise
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        raise SourceError(
            f"{path}: expected the metadata of a torch.distributed checkpoint, got a damaged or another file. "
            "Fetch it again."
        ) from error


def _fields(record: Any, kind: str) -> Mapping[str, Any]:
    """Return the fields of a record of that class. Raises TypeError."""
    if not isinstance(record, _Record) or type(record).__name__ != kind or not isinstance(record.fields, Mapping):
        raise TypeError(kind)
    return record.fields


def _parse(fields: Mapping[str, Any], path: Path) -> DistributedMetadata:
    stored = dict(_places(fields["storage_data"], path))
    paths = fields.get("planner_data") or {}
    tensors, nest = [], dict[Any, Any]()
    for name, entry in fields["state_dict_metadata"].items():
        value: Any = b""
        if type(entry).__name__ == "TensorStorageMetadata":
            tensor = _tensor(name, _fields(entry, "TensorStorageMetadata"), stored)
            value = tensor.placeholder
            tensors.append(tensor)
        _put(nest, tuple(paths.get(name, (name,))), value)
    return DistributedMetadata(_with_lists(nest), tuple(tensors))


def _places(storage_data: Mapping[Any, Any], path: Path) -> Iterable[tuple[Any, tuple[str, int, int]]]:
    """Yield where each chunk is, by its tensor and offset."""
    for key, info in storage_data.items():
        index, place = _fields(key, "MetadataIndex"), _fields(info, "_StorageInfo")
        file, start, length = place["relative_path"], place["offset"], place["length"]
        if transforms := place.get("transform_descriptors"):
            raise SourceError(
                f"{path}: expected plain bytes, got bytes that {transforms[0]!r:.60} has transformed. "
                "Save it without extensions."
            )
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or any(c in file for c in "\\\0:"):
            raise SourceError(f"{path}: expected files of its own folder, got {file!r}. Do not trust this checkpoint.")
        yield (index["fqn"], _sizes(index.get("offset") or ())), (file, *_sizes((start, length)))


def _tensor(name: str, fields: Mapping[str, Any], stored: Mapping[Any, tuple[str, int, int]]) -> StoredTensor:
    dtype = fields["properties"].fields[0]
    chunks = []
    for record in fields["chunks"]:
        chunk = _fields(record, "ChunkStorageMetadata")
        offset, size = _sizes(chunk["offsets"]), _sizes(chunk["sizes"])
        chunks.append(Chunk(offset, size, *stored[name, offset]))
    return StoredTensor(torch.empty(_sizes(fields["size"]), dtype=dtype, device="meta"), tuple(chunks))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise TypeError("sizes")
    return value


def _put(nest: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    *above, last = path
    for part in above:
        nest = nest.setdefault(part, {})
    if not isinstance(nest, dict) or last in nest or not all(isinstance(part, str | int) for part in path):
        raise TypeError("path")
    nest[last] = value


def _with_lists(nest: Any) -> Any:
    """Make lists of what was one: DCP counts its items."""
    if not isinstance(nest, dict):
        return nest
    items = {name: _with_lists(item) for name, item in nest.items()}
    return list(items.values()) if items and all(isinstance(name, int) for name in items) else items
