"""The records of a PyTorch zip archive against what its pickle says of them, which mapping the file does not compare.

torch.load(mmap=True) takes the bytes at a record's offset for the storage, whether the record is deflated, shorter or
longer; without mmap it inflates or refuses. torch.load to the meta device tells each storage's size and offset, the
latter as torch.save would have placed it.
"""

import errno
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.errors import SourceError
from surgery.files import open_file
from surgery.io_errors import naming

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of an entry in a zip archive: signature, lengths of name and extra field
LOCAL_HEADER = _LOCAL_HEADER.size
_SIGNATURE = b"PK\3\4"
_FOLDER = 0x10  # of an entry's attributes
_UNREADABLE = (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError)
_DEPTH = 8  # of nests that tensors are looked for in: a pickle may hold itself


_MOST_PICKLED = 1 << 28  # bytes of a compressed pickle: it holds names and shapes, and is inflated at once


def is_mappable(path: Path) -> bool:
    """Tell whether the bytes of a file are those of its tensors; where that is not sure, torch.load shall read it all.

    Raises:
        ValueError: its pickle is a bomb.
    """
    entries = _entries(path)
    for entry in entries:
        if entry.filename.endswith("/data.pkl") and entry.compress_type and entry.file_size > _MOST_PICKLED:
            raise ValueError(f"expected a pickle of at most {_MOST_PICKLED} bytes, got {entry.file_size}")
    if any(entry.compress_type for entry in entries) or not _is_native(path, entries):
        return False
    return _has_own_sizes(path) if entries else not _is_archive(path)


def _has_own_sizes(path: Path) -> bool:
    """Tell whether each storage is as large as its record."""
    sizes = _sizes(path)
    try:
        loaded = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # such as of quantized tensors, which there are none of on the meta device
        return False
    for storage in _storages(loaded, _DEPTH, set()):
        offset = getattr(storage, "_checkpoint_offset", None)  # older torch does not tell
        if offset is not None and sizes.get(offset) != storage.nbytes():
            return False
    return True


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with naming(path), zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return []  # torch.load says what it is


def _is_archive(path: Path) -> bool:
    """Tell it as torch does, which lists some archives that Python does not."""
    with open_file(path) as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


def _is_native(path: Path, entries: Iterable[zipfile.ZipInfo]) -> bool:
    """Tell whether an archive names no byte order but the machine's own: torch crashes swapping what it has mapped.

    It may name several, and torch takes capitals for small letters.
    """
    named = [entry for entry in entries if entry.filename.lower().endswith("byteorder")]
    if not named:
        return True
    try:
        with naming(path), zipfile.ZipFile(path) as archive:
            return all(entry.file_size < 10 and archive.read(entry).decode() == sys.byteorder for entry in named)
    except _UNREADABLE:  # to Python, which compares the two headers of an entry
        return False
    except OSError as error:
        _raise_unless_damaged(error)
        return False


def refuse_unread(path: Path, label: str) -> None:
    """Refuse an archive with a record that torch.load without mmap reads nothing of, but leaves what was in memory.

    Raises:
        SourceError: it is marked as a folder, or cannot be inflated, or Python cannot list the records.
    """
    entries = _entries(path)
    if not entries:
        raise SourceError(
            f"{label}: expected an archive with a list of its records, got a damaged one. Fetch it again."
        )
    for entry in entries:
        if entry.file_size and not _is_readable(path, entry):
            raise SourceError(
                f"{label}: {entry.filename!r}: expected a record that can be read, got a damaged one. Fetch it again."
            )


def _is_readable(path: Path, entry: zipfile.ZipInfo) -> bool:
    if entry.external_attr & _FOLDER:
        return False
    if not entry.compress_type:
        return True
    try:
        with naming(path), zipfile.ZipFile(path) as archive, archive.open(entry) as file:
            while file.read(1 << 20):
                pass
    except (*_UNREADABLE, zlib.error):
        return False
    except OSError as error:
        _raise_unless_damaged(error)
        return False
    return True


def _raise_unless_damaged(error: OSError) -> None:
    """Tell the disk's errors from that of an archive which has an entry before its beginning."""
    if error.errno != errno.EINVAL:
        raise error


def _sizes(path: Path) -> dict[int, int]:
    """Return the size of each record with a header of its own by the offset of its bytes."""
    sizes = {}
    with open_file(path) as file:
        for entry in _entries(path):
            file.seek(max(entry.header_offset, 0))  # damaged archives have it before their beginning
            begin = begin_of(entry, file.read(LOCAL_HEADER))
            if begin is not None:
                sizes[begin] = entry.file_size
    return sizes


def begin_of(entry: zipfile.ZipInfo, head: bytes) -> int | None:
    """Return where an entry's bytes begin, by the LOCAL_HEADER bytes before them; None if these are no header."""
    signature, name, extra = _LOCAL_HEADER.unpack(head.ljust(LOCAL_HEADER, b"\0"))
    return entry.header_offset + LOCAL_HEADER + name + extra if signature == _SIGNATURE else None


def _storages(value: Any, depth: int, seen: set[int]) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value.untyped_storage()
    elif depth and isinstance(value, Mapping | list | tuple) and id(value) not in seen:
        seen.add(id(value))  # what holds itself many times would be gone through for ever
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _storages(item, depth - 1, seen)
