"""Mutated archives of torch.save: bytes, operations of their pickle, records, directory, and the format before 1.6."""

import io
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from mutations import mutate_bytes

_TOKENS = (
    *b"0N)]}(.eu\x85\x86\x87R",
    b"h\x00",
    b"K\x00",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"q\x01",
)
_SIZES = (-(2**40), -4, -1, 0, 1, 2, 3, 4, 5, 8, 16, 255, 2**16, 2**28, 2**31 - 1, 2**31, 2**32, 2**40, 2**61, 2**62)
_STORAGES = "FloatStorage DoubleStorage HalfStorage BFloat16Storage LongStorage ByteStorage BoolStorage".split()
_GLOBALS = (
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ccollections\nOrderedDict\n",
    b"cos\nsystem\n",
    b"ctorch\nQInt8Storage\n",
)

Members = list[tuple[str, bytes]]


def _states() -> Iterator[Any]:
    base = torch.arange(24.0)
    plain = {
        "a.weight": base.reshape(4, 6),
        "a.bias": torch.ones(4),
        "ids": torch.arange(3),
        "flag": torch.tensor([True]),
    }
    yield plain
    yield {
        "half": base.half(),
        "brain": base.bfloat16(),
        "z": torch.ones(3, dtype=torch.complex64),
        "e": torch.empty(0, 3),
    }
    yield {"a": base[:8], "b": base[8:16], "t": base[16:].reshape(2, 4).t(), "tied": base[:8]}
    yield {"state_dict": plain, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}
    yield {"p": torch.nn.Parameter(base[:6]), "x": torch.ones(1).expand(5), "s": torch.tensor(2.0, dtype=torch.float64)}


def _saved(state: Any, *, is_zip: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


def _members(archive: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return [(entry.filename, file.read(entry)) for entry in file.infolist()]


_ZIPS = [_saved(state, is_zip=True) for state in _states()]
_LEGACY = [_saved(state, is_zip=False) for state in _states()]
_MEMBERS = [_members(archive) for archive in _ZIPS]


def _operations(pickled: bytes) -> list[bytes]:
    """Cut a pickle into its operations."""
    starts = [position for _, _, position in pickletools.genops(pickled)]
    return [pickled[begin:end] for begin, end in zip(starts, [*starts[1:], len(pickled)], strict=True)]


def _number(n: int) -> bytes:
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _mutate_operations(r: Random, pickled: bytes) -> bytes:
    """Change numbers, storage types and whole operations: what is left is a pickle more often than by bytes."""
    operations = _operations(pickled)
    numbers = [i for i, operation in enumerate(operations) if operation[:1] in b"KMJ\x8a"]
    storages = [i for i, operation in enumerate(operations) if operation.endswith(b"Storage\n")]
    for _ in range(r.randint(1, 3)):
        at = r.randrange(len(operations))
        match r.randrange(8):
            case 0 | 1 | 2 | 3:
                operations[r.choice(numbers)] = _number(r.choice(_SIZES))
            case 4 if storages:
                operations[r.choice(storages)] = b"ctorch\n" + r.choice(_STORAGES).encode() + b"\n"
            case 5:
                operations[at] = r.choice((b"", operations[at] * 2, r.choice(operations), r.choice(_GLOBALS)))
            case 6:
                other = r.randrange(len(operations))
                operations[at], operations[other] = operations[other], operations[at]
            case _:
                operations[at] = mutate_bytes(r, operations[at], _TOKENS, most=1)
    return b"".join(operations)


def _mutate_members(r: Random, members: Members) -> Members:
    """Change, double, rename or drop records, or the pickle among them."""
    members = list(members)
    for _ in range(r.choice((1, 1, 2))):
        at = r.randrange(len(members))
        name, data = members[at]
        match r.randrange(10):
            case 0:
                del members[at]
                members = members or [(name, data)]
            case 1:
                members.append((name, r.choice((data, data[::-1], data + b"\0" * 4, r.choice(members)[1]))))
            case 2:
                members[at] = (
                    r.choice((name + "x", name.partition("/")[2], "other/" + name, "../" + name, name.upper())),
                    data,
                )
            case 3:
                members[at] = (
                    name,
                    r.choice((data[:-1], data[:-4], data + b"\1" * 4, data * 2, b"", mutate_bytes(r, data))),
                )
            case 4:
                word = r.choice(("byteorder", ".format_version", "version", "constants.pkl", ".storage_alignment"))
                members.append(
                    (f"archive/{word}", r.choice((b"big", b"little", b"x", b"", b"1", b"64\n", b"-1", b"\xff")))
                )
            case 5:
                r.shuffle(members)
            case _:
                members = [(n, _mutate_pickle(r, d) if n.endswith("/data.pkl") else d) for n, d in members]
    return members


def _mutate_pickle(r: Random, pickled: bytes) -> bytes:
    try:
        return _mutate_operations(r, pickled) if r.random() < 0.8 else mutate_bytes(r, pickled, _TOKENS)
    except (ValueError, IndexError):  # mutated before
        return mutate_bytes(r, pickled, _TOKENS)


def _as_torch_writes(members: Members) -> bytes:
    """Write an archive with its records where torch.save puts them."""
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    for name, data in members:
        writer.write_record(name.removeprefix("archive/"), data, len(data))
    writer.write_end_of_file()
    return stream.getvalue()


def _as_zip(r: Random, members: Members) -> bytes:
    """Write an archive as any zip program does, some of it deflated."""
    stream = io.BytesIO()
    deflated = r.choice((0, 0, 0.3, 1))
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in members:
            file.writestr(name or "x", data, zipfile.ZIP_DEFLATED if r.random() < deflated else zipfile.ZIP_STORED)
    return stream.getvalue()


def _mutated_archive(r: Random) -> bytes:
    members = _mutate_members(r, r.choice(_MEMBERS))
    try:
        return _as_torch_writes(members) if r.random() < 0.6 else _as_zip(r, members)
    except RuntimeError:  # what torch does not write, such as a name twice
        return _as_zip(r, members)


def _mutated_directory(r: Random) -> bytes:
    """Mutate the end of an archive, which says where its records are."""
    whole = r.choice(_ZIPS)
    start = whole.index(b"PK\1\2")
    return whole[:start] + mutate_bytes(r, whole[start:])


def _mutated_local_header(r: Random) -> bytes:
    whole = r.choice(_ZIPS)
    starts = [at for at in range(len(whole)) if whole.startswith(b"PK\3\4", at)]
    at = r.choice(starts)
    head = bytearray(whole[at : at + 46])
    head[r.randrange(len(head))] = r.randrange(256)
    return whole[:at] + head + whole[at + 46 :]


def _mutated_legacy(r: Random) -> bytes:
    """Mutate one of the pickles that a file of torch before 1.6 is a row of, or what follows them."""
    rest = r.choice(_LEGACY)
    parts = []
    for _ in range(5):
        stream = io.BytesIO(rest)
        for _ in pickletools.genops(stream):
            pass
        parts.append(rest[: stream.tell()])
        rest = rest[stream.tell() :]
    at = r.choice((0, 1, 2, 3, 3, 3, 3, 4, 5, 5))
    parts = [*parts, rest]
    parts[at] = _mutate_pickle(r, parts[at]) if at in (3, 4) else mutate_bytes(r, parts[at])
    return b"".join(parts)


def _mutated_bytes(r: Random) -> bytes:
    return mutate_bytes(r, r.choice((*_ZIPS, *_LEGACY)), _TOKENS)


_WAYS: tuple[Callable[[Random], bytes], ...] = (
    *(_mutated_archive,) * 6,
    *(_mutated_legacy,) * 2,
    _mutated_directory,
    _mutated_local_header,
    _mutated_bytes,
)


def mutated_checkpoint(r: Random) -> bytes:
    return r.choice(_WAYS)(r)
