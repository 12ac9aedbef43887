"""Storages: what torch.load reads is read, what it refuses is refused, and columns of one matrix are no overlap."""

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from surgery.checkpoint import storages  # noqa: E402
from surgery.checkpoint.pickle_records import is_mappable  # noqa: E402
from surgery.checkpoint.pickles import PickleFile  # noqa: E402
from surgery.checkpoint.storages import overlap  # noqa: E402
from surgery.errors import SourceError  # noqa: E402

_DAMAGED = "x: expected a PyTorch checkpoint, got a damaged or another file. Fetch it again."


def _read(path: Path) -> dict[str, Any]:
    file = PickleFile(path, label="x")
    found = {}
    for tensor in file.header.tensors:
        buffer = bytearray(tensor.nbytes)
        file.read_into(tensor, 0, memoryview(buffer))
        found[tensor.name] = torch.frombuffer(buffer, dtype=torch.float32).reshape(tensor.shape)
    file.close()
    return found


def _assert_read_as_torch_reads(path: Path) -> None:
    expected, found = torch.load(path, weights_only=True), _read(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


_BASE = torch.arange(48.0).reshape(6, 8)
_APART = {
    "column chunks": dict(zip("abcd", _BASE.chunk(4, dim=1), strict=True)),
    "row chunks": dict(zip("abc", _BASE.chunk(3, dim=0), strict=True)),
    "transposed": {"a": _BASE[:, :3].t(), "b": _BASE[:, 3:]},
    "interleaved": {"a": _BASE[:, ::2], "b": _BASE[:, 1::2]},
    "a column": {"a": _BASE[:, 0], "b": _BASE[:, 1:]},
    "blocks": {"a": _BASE[:3, :4], "b": _BASE[:3, 4:], "c": _BASE[3:, :4], "d": _BASE[3:, 4:]},
    "convolution": dict(zip("ab", torch.arange(64.0).reshape(2, 4, 2, 4).chunk(2, dim=1), strict=True)),
    "expanded": {"a": _BASE[0, :1].expand(5), "b": _BASE[:, 1:]},
}
_TOUCHING = {
    "columns": ({"a": _BASE[:, :5], "b": _BASE[:, 4:]}, "b", "a"),
    "rows": ({"a": _BASE[:4], "b": _BASE[3:]}, "b", "a"),
    "whole": ({"a": _BASE, "b": _BASE[:, 2:3]}, "b", "a"),
    "another shape": ({"a": _BASE, "b": _BASE.reshape(-1)}, "b", "a"),
    "transposed": ({"a": _BASE, "b": _BASE.t()}, "b", "a"),
    "third": ({"a": _BASE[:, :2], "b": _BASE[:, 4:6], "c": _BASE[:, 5:7]}, "c", "b"),
}


@pytest.mark.parametrize("tensors", _APART.values(), ids=_APART)
def test_views_that_share_no_element_are_read(tensors: dict[str, Any], tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "x.pt")
    _assert_read_as_torch_reads(tmp_path / "x.pt")


@pytest.mark.parametrize(("tensors", "name", "other"), _TOUCHING.values(), ids=_TOUCHING)
def test_views_that_share_elements_are_refused(tensors: dict[str, Any], name: str, other: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == (
        f"x: {name!r}: expected tensors that are equal or apart, got one that overlaps {other!r}. "
        "Save a copy of it with .clone()."
    )


def test_views_of_a_huge_storage_are_told_by_their_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "_MOST", 8)
    assert overlap(_APART["column chunks"]) == ("a", "b")
    assert overlap(_APART["row chunks"]) is None


# -- archives -----------------------------------------------------------------------------------------------------


def _rewrite(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("/data/0") else data)


def test_archive_of_torch_save_is_mapped(tmp_path: Path) -> None:
    torch.save({"model": {"w": _BASE, "v": _BASE[:2]}, "optimizer": {"state": {0: torch.ones(3)}}}, tmp_path / "x.pt")
    assert is_mappable(tmp_path / "x.pt")


def test_deflated_archive_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    torch.save({"w": _BASE, "v": _BASE + 1}, tmp_path / "x.pt")
    _rewrite(tmp_path / "x.pt", lambda data: data, zipfile.ZIP_DEFLATED)
    _assert_read_as_torch_reads(tmp_path / "x.pt")


def test_archive_that_was_packed_again_is_read(tmp_path: Path) -> None:
    torch.save({"w": _BASE, "v": _BASE + 1}, tmp_path / "x.pt")
    _rewrite(tmp_path / "x.pt", lambda data: data)
    _assert_read_as_torch_reads(tmp_path / "x.pt")


def _patch(path: Path, name: bytes, at: int, new: bytes, *, last: bool = False) -> None:
    """Write bytes relative to a record's name in its local header, or in the directory at the end."""
    data = bytearray(path.read_bytes())
    place = (data.rindex(name) if last else data.index(name)) + at
    data[place : place + len(new)] = new
    path.write_bytes(data)


@pytest.mark.parametrize("name", [b"bytExrder", b"byte\xffrder"], ids=["another", "not UTF-8"])
def test_archive_whose_local_header_has_another_name_is_read_as_torch_reads_it(name: bytes, tmp_path: Path) -> None:
    torch.save({"w": _BASE}, tmp_path / "x.pt")
    _patch(tmp_path / "x.pt", b"byteorder", 0, name)
    _assert_read_as_torch_reads(tmp_path / "x.pt")


def test_record_without_a_header_of_its_own_is_refused_as_torch_refuses_it(tmp_path: Path) -> None:
    torch.save({"w": _BASE}, tmp_path / "x.pt")
    _patch(tmp_path / "x.pt", b"x/data/0", -30, b"PX")
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "x.pt", weights_only=True)
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == _DAMAGED


def test_archive_whose_directory_begins_before_the_file_is_refused(tmp_path: Path) -> None:
    torch.save({"w": _BASE}, tmp_path / "x.pt")
    directory_offset = 48  # eight bytes, in the record that ends a zip64 archive
    _patch(tmp_path / "x.pt", b"PK\6\6", directory_offset + 5, b"\x08", last=True)
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == _DAMAGED


@pytest.mark.parametrize("name", ["x/byteorder", "x/ByteOrder"], ids=["twice", "in capitals too"])
def test_archive_of_two_byte_orders_is_read_as_torch_reads_it(name: str, tmp_path: Path) -> None:
    """Mapped, it ends the process."""
    torch.save({"w": _BASE}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr(name, "big")
    assert not is_mappable(tmp_path / "x.pt")
    _assert_read_as_torch_reads(tmp_path / "x.pt")


_UNREADABLE = "x: 'x/data/0': expected a record that can be read, got a damaged one. Fetch it again."


def test_record_that_cannot_be_inflated_is_refused(tmp_path: Path) -> None:
    """torch.load leaves in it what was in memory."""
    torch.save({"w": _BASE}, tmp_path / "x.pt")
    _patch(tmp_path / "x.pt", b"x/data/0", -36, b"\x08", last=True)  # its method in the directory
    torch.load(tmp_path / "x.pt", weights_only=True)
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == _UNREADABLE


def test_record_that_is_marked_as_a_folder_is_refused_where_it_is_not_mapped(tmp_path: Path) -> None:
    torch.save({"w": _BASE}, tmp_path / "x.pt")
    _rewrite(tmp_path / "x.pt", lambda data: data, zipfile.ZIP_DEFLATED)
    _patch(tmp_path / "x.pt", b"x/data/0", -8, b"\x10", last=True)  # its attributes in the directory
    torch.load(tmp_path / "x.pt", weights_only=True)
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == _UNREADABLE


def test_archive_that_python_does_not_list_is_refused(tmp_path: Path) -> None:
    torch.save({"w": _BASE}, tmp_path / "x.pt")
    _patch(tmp_path / "x.pt", b"PK\6\7", 0, bytes(4), last=True)  # says where a record is that torch does without
    torch.load(tmp_path / "x.pt", weights_only=True)
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == ("x: expected an archive with a list of its records, got a damaged one. Fetch it again.")


def test_storage_that_an_old_file_does_not_list_is_refused(tmp_path: Path) -> None:
    """torch.load leaves in it what was in memory."""
    torch.save({"w": _BASE, "v": _BASE + 1}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pt").read_bytes()
    _read(tmp_path / "x.pt")
    listed = data.rindex(b"]q")  # of both storages: take the second out
    second = data.index(b"X", data.index(b"X", listed) + 1)
    end = data.index(b"e.", second)
    (tmp_path / "x.pt").write_bytes(data[:second] + data[end : len(data) - 8 - _BASE.nbytes])
    torch.load(tmp_path / "x.pt", weights_only=True)
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == (
        "x: expected a PyTorch checkpoint with the bytes of all its tensors, got one without 1 of its storages. "
        "Fetch it again."
    )


def test_damage_of_an_old_file_that_torch_overlooks_is_refused(tmp_path: Path) -> None:
    torch.save({"w": _BASE}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.rindex(b"\x80\x02]q") + 1] = 91  # the protocol of the pickle that lists storages
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == (
        "x: expected pickles as torch before 1.6 wrote them, got a damaged one. Fetch it again."
    )


def test_one_element_of_any_stride_is_read(tmp_path: Path) -> None:
    torch.save({"w": _BASE[0, :1].expand(1).as_strided((1,), (0,)), "v": torch.ones(())}, tmp_path / "x.pt")
    _assert_read_as_torch_reads(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change", [lambda data: data[:5], lambda data: data * 2, lambda _: b""], ids=["short", "long", "empty"]
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_record_of_another_size_is_refused(change: Any, compression: int, tmp_path: Path) -> None:
    """Mapped, the bytes of the next record would be taken for weights."""
    torch.save({"w": _BASE, "v": _BASE + 1}, tmp_path / "x.pt")
    _rewrite(tmp_path / "x.pt", change, compression)
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "x.pt", weights_only=True)
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == _DAMAGED


def test_tensor_expanded_to_terabytes_is_refused_before_it_is_laid_out(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(4)[:1].expand(2**40)}, tmp_path / "x.pt")
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == (
        "x: 'w': expected a tensor of elements of its own, got 4398046511104 bytes that repeat 16. "
        "Save what it repeats."
    )


def test_size_beyond_64_bits_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(2**62)}, tmp_path / "x.pt")
    with pytest.raises(SourceError) as error:
        PickleFile(tmp_path / "x.pt", label="x")
    assert str(error.value) == (
        f"x: 'w': expected a tensor of elements of its own, got {2**64} bytes that repeat 4. Save what it repeats."
    )


def test_file_cut_while_it_is_mapped_ends_in_an_error(tmp_path: Path) -> None:
    """Not in SIGBUS."""
    torch.save({"w": torch.ones(1 << 20)}, tmp_path / "x.pt")
    file = PickleFile(tmp_path / "x.pt", label="x")
    os.truncate(tmp_path / "x.pt", 1000)
    tensor = file.header.tensors[0]
    with pytest.raises(SourceError, match="expected a file at rest, got one that changed while it was read"):
        file.read_into(tensor, 0, memoryview(bytearray(tensor.nbytes)))
    file.close()
