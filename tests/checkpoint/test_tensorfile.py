"""safetensors files: every malformed header is refused by name, and nothing that safetensors refuses is accepted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import raw_safetensors, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from surgery.checkpoint.tensorfile import TensorFile, build_header, read_header
from surgery.dtypes import BITS
from surgery.errors import SourceError

_FETCH = "Fetch it again."


def _entry(begin: int, end: int, *, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _file(table: dict[str, Any], size: int = 16) -> bytes:
    return raw_safetensors(json.dumps(table).encode(), bytes(size))


_WHOLE = save(tensors(), {"format": "pt"})
_JSON = f"expected a JSON header of tensors, got a malformed one. {_FETCH}"
_WHOLE_NUMBERS = f"'a': expected whole, positive numbers for shape and range. {_FETCH}"
_DAMAGED = "The file is truncated or damaged; fetch it again."
_FOREIGN = "The file is truncated or not safetensors; fetch it again."


def _cut(size: int, length: int) -> str:
    return f"expected a safetensors header within its {size} bytes, got one of {length} bytes. {_FOREIGN}"


def _apart(name: str, fault: str) -> str:
    return f"expected tensors back to back, got '{name}', which {fault} before it. {_FETCH}"


_BAD = {
    "empty": (b"", f"expected a safetensors file, got an empty file. {_FETCH}"),
    "seven bytes": (b"\1" * 7, _cut(7, 0x01010101010101)),
    "truncated": (_WHOLE[:-9], f"expected {len(_WHOLE)} bytes, as its header says, got {len(_WHOLE) - 9}. {_DAMAGED}"),
    "longer": (_WHOLE + b"x", f"expected {len(_WHOLE)} bytes, as its header says, got {len(_WHOLE) + 1}. {_DAMAGED}"),
    "truncated header": (_WHOLE[:40], _cut(40, int.from_bytes(_WHOLE[:8], "little"))),
    "header longer than the file": (raw_safetensors(b"{}", length=3), _cut(10, 3)),
    "huge header": (raw_safetensors(b"{}", length=2**64 - 1), _cut(10, 2**64 - 1)),
    "cut JSON": (raw_safetensors(b'{"a": {'), _JSON),
    "not UTF-8": (raw_safetensors(b'{"\xff\xfe": 1}'), _JSON),
    "list": (raw_safetensors(b"[]"), _JSON),
    "string": (raw_safetensors(b'"abc"'), _JSON),
    "number": (raw_safetensors(b"1"), _JSON),
    "deep": (raw_safetensors(b"[" * 100_000), _JSON),
    "deep objects": (raw_safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), _JSON),
    "endless number": (raw_safetensors(b'{"a": ' + b"1" * 10_000 + b"}"), _JSON),
    "no dtype": (_file({"a": {"shape": [4], "data_offsets": [0, 16]}}), _JSON),
    "no range": (_file({"a": {"dtype": "F32", "shape": [4]}}), _JSON),
    "three offsets": (_file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}), _JSON),
    "dtype of another kind": (_file({"a": _entry(0, 16, dtype=["F32"])}), _JSON),
    "unknown dtype": (
        _file({"a": _entry(0, 16, dtype="F31")}),
        f"'a': expected a safetensors dtype, got 'F31'. {_FETCH}",
    ),
    "negative shape": (_file({"a": _entry(0, 16, shape=[-4])}), _WHOLE_NUMBERS),
    "fraction": (_file({"a": _entry(0, 16, shape=[4.0])}), _WHOLE_NUMBERS),
    "backwards": (_file({"a": _entry(16, 0, shape=[4])}), f"'a': expected 16 bytes for F32 [4], got -16. {_FETCH}"),
    "wrong size": (_file({"a": _entry(0, 16, shape=[5])}), f"'a': expected 20 bytes for F32 [5], got 16. {_FETCH}"),
    "overflow": (
        _file({"a": _entry(0, 16, shape=[2**62, 4])}),
        f"'a': expected {2**66} bytes for F32 {[2**62, 4]}, got 16. {_FETCH}",
    ),
    "overlap": (_file({"a": _entry(0, 8), "b": _entry(4, 16)}), _apart("b", "overlaps the one")),
    "twice the same bytes": (_file({"a": _entry(0, 16), "b": _entry(0, 16)}), _apart("b", "overlaps the one")),
    "gap": (_file({"a": _entry(0, 4), "b": _entry(8, 16)}), _apart("b", "leaves a gap")),
    "gap at the start": (_file({"a": _entry(8, 16)}), _apart("a", "leaves a gap")),
    "duplicate tensor": (
        raw_safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(_entry(0, 16)).encode(),) * 2), bytes(16)),
        f"expected each name once in the header, got 'a' twice. {_FETCH}",
    ),
}


@pytest.mark.parametrize(("content", "message"), _BAD.values(), ids=_BAD)
def test_malformed_file_is_refused(content: bytes, message: str, refuses: Callable[..., None], source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(content)
    refuses(f"{file}: {message}", "source", "-o", "out")


def test_metadata_of_another_kind_is_refused_in_safetensors_words(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(_file({"__metadata__": {"format": 1}, "a": _entry(0, 16)}))
    with pytest.raises(SourceError, match=r"^x: expected a valid safetensors file, got .*\. Fetch it again\.$"):
        read_header(file, label="x")


def test_header_of_every_dtype_is_read(tmp_path: Path) -> None:
    """Eight elements are whole bytes in every dtype."""
    file = tmp_path / "x.safetensors"
    for dtype, bits in BITS.items():
        file.write_bytes(_file({"a": _entry(0, bits, dtype=dtype, shape=[8])}, bits))
        (tensor,) = read_header(file, label="x").tensors
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == (dtype, (8,), bits)


def test_file_that_shrinks_while_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(_WHOLE)
    opened = TensorFile(file, label="x")
    tensor = opened.header.tensors[-1]
    with file.open("r+b") as handle:
        handle.truncate(tensor.end - 4)
    message = f"{file}: expected {tensor.end} bytes, got fewer. It changed while it was read; run again."
    with pytest.raises(SourceError) as error:
        opened.read_into(tensor, 0, memoryview(bytearray(tensor.nbytes)))
    opened.close()
    assert str(error.value) == message


# -- properties ---------------------------------------------------------------------------------------------------

_MODEST = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _agrees_with_safetensors(file: Path) -> None:
    """What we accept, safetensors accepts, with the same tensors; we fail with SourceError alone."""
    try:
        ours = read_header(file, label="x")
    except SourceError:
        return
    with safe_open(file, framework="numpy") as theirs:
        assert {tensor.name for tensor in ours.tensors} == set(theirs.keys())
        for tensor in ours.tensors:
            assert list(tensor.shape) == theirs.get_slice(tensor.name).get_shape()


@_MODEST
@given(content=st.binary(max_size=200))
def test_random_bytes_never_crash(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    _agrees_with_safetensors(tmp_path / "x.safetensors")


@_MODEST
@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 40), more=st.binary(max_size=3))
def test_mutated_file_never_crashes(at: int, byte: int, cut: int, more: bytes, tmp_path: Path) -> None:
    mutated = bytearray(_WHOLE)
    mutated[at] = byte
    (tmp_path / "x.safetensors").write_bytes(bytes(mutated[: len(mutated) - cut]) + more)
    _agrees_with_safetensors(tmp_path / "x.safetensors")


_NUMBERS = st.one_of(st.integers(-2, 20), st.sampled_from([2**31, 2**63, 2**64, 2**70, True, None, 1.5, "1"]))
_ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*BITS, "F31", "", None, 1]),
            "shape": st.lists(_NUMBERS, max_size=3),
            "data_offsets": st.lists(_NUMBERS, min_size=1, max_size=3),
        },
        optional={"extra": st.none()},
    ),
    st.none(),
    st.lists(st.integers(), max_size=2),
)


@_MODEST
@given(
    table=st.dictionaries(st.one_of(st.text(max_size=3), st.just("__metadata__")), _ENTRIES, max_size=3),
    size=st.integers(0, 64),
    spaces=st.integers(0, 9),
)
def test_random_header_never_crashes(table: dict[str, Any], size: int, spaces: int, tmp_path: Path) -> None:
    header = json.dumps(table).encode() + b" " * spaces
    (tmp_path / "x.safetensors").write_bytes(raw_safetensors(header, bytes(size)))
    _agrees_with_safetensors(tmp_path / "x.safetensors")


_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}
_TABLE = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(_DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=6,
)


@_MODEST
@given(table=_TABLE, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=1))
def test_built_header_is_what_safetensors_writes(
    table: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    """Byte for byte, and it reads back."""
    try:
        theirs = save({name: np.zeros(shape, _DTYPES[dtype]) for name, (dtype, shape) in table.items()}, metadata)
    except (SafetensorError, UnicodeEncodeError):
        return
    header = build_header(((name, *entry) for name, entry in table.items()), metadata)
    assert header.raw + bytes(header.file_size - len(header.raw)) == theirs
    assert {name: array.shape for name, array in load(theirs).items()} == {t.name: t.shape for t in header.tensors}
