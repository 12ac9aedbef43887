"""Files written past the page cache: the same bytes, whatever their size and the file system."""

import ctypes
import errno
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from surgery.perturb import partfile
from surgery.perturb.partfile import PartFile

BUFFER = partfile._WINDOW
SIZES = [0, 1, 511, 512, 4095, 4096, 4097, BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER, 3 * BUFFER + 777]


def written(path, nbytes, chunk):
    """Write `nbytes` random bytes in appends of `chunk`; return them."""
    data = np.random.default_rng(nbytes).bytes(nbytes)
    part = PartFile(path)
    for start in range(0, nbytes, chunk):
        part.append(memoryview(data)[start : start + chunk])
    assert part.finish() == nbytes
    return data


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("chunk", [BUFFER * 2, 1_000_003], ids=["large", "odd"])
def test_bytes_arrive(tmp_path, nbytes, chunk):
    assert written(tmp_path / "f", nbytes, chunk) == (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("nbytes", SIZES[-3:])
def test_bytes_arrive_where_direct_writes_are_refused(tmp_path, nbytes, monkeypatch):
    real_open, real_pwrite, refused = os.open, os.pwrite, []

    def refuse(fd, data, offset):
        if not refused:
            refused.append(offset)
            raise OSError(22, "Invalid argument")
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    assert written(tmp_path / "late", nbytes, BUFFER) == (tmp_path / "late").read_bytes()
    assert refused == [0]

    def refuse_flag(path, flags, mode=0o777):
        if flags & partfile._DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse_flag)
    assert written(tmp_path / "early", nbytes, BUFFER) == (tmp_path / "early").read_bytes()


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:65536], offset))
    assert written(tmp_path / "f", BUFFER + 5, BUFFER) == (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("when", ["append", "finish"])
def test_a_full_disk_is_raised(tmp_path, monkeypatch, when):
    def full(*_):
        raise OSError(28, "No space left on device")

    part = PartFile(tmp_path / "f")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        part.append(bytes(BUFFER)) if when == "append" else (part.append(bytes(100)), part.finish())
    part.close()
    part.close()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        written(tmp_path / "f", 10, 10)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


def test_windows_are_written_in_any_order(tmp_path):
    sizes = [10, 5000, 4096, 1, 3, 70_000, 4086, 8192, 123]
    data = np.random.default_rng(0).bytes(sum(sizes))
    part, position, left = PartFile(tmp_path / "f"), 0, []
    for nbytes in sizes:
        window = partfile.new_window(70_000)
        partfile.place_in(window, position, nbytes)[:] = data[position : position + nbytes]
        left.append(part.take(position, window, nbytes))
        position += nbytes
    for write in reversed(left):
        write()
    assert part.finish() == len(data)
    assert (tmp_path / "f").read_bytes() == data


def test_two_writes_at_once_may_find_direct_writes_refused(tmp_path, monkeypatch):
    real, both = os.pwrite, threading.Barrier(2, timeout=10)

    def refuse_direct(fd, data, offset):
        if part._is_direct:
            both.wait()
            raise OSError(22, "Invalid argument")
        return real(fd, data, offset)

    part, data = PartFile(tmp_path / "f"), np.random.default_rng(0).bytes(2 * 8192)
    left = []
    for start in (0, 8192):
        window = partfile.new_window(8192)
        window[:8192] = data[start : start + 8192]
        left.append(part.take(start, window, 8192))
    monkeypatch.setattr(os, "pwrite", refuse_direct)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda write: write(), left))
    part.finish()
    assert (tmp_path / "f").read_bytes() == data


@pytest.mark.parametrize("size", [1, 5000, 100_000])
def test_room_that_was_taken_and_not_used_is_given_back(tmp_path, size):
    part, data = PartFile(tmp_path / "f", size), np.random.default_rng(0).bytes(5000)
    part.append(data)
    assert part.finish() == 5000
    assert (tmp_path / "f").read_bytes() == data


@pytest.fixture
def refusing(monkeypatch):
    """Let fallocate fail; call it with an errno."""

    def refuse(code):
        def fallocate(*_):
            ctypes.set_errno(code)
            return -1

        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=fallocate))

    if not partfile._DIRECT:
        pytest.skip("this system has no direct writes")
    return refuse


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_raised_before_anything_is_written(tmp_path, refusing, code):
    refusing(code)
    with pytest.raises(OSError, match=os.strerror(code)):
        PartFile(tmp_path / "f", 5000)
    assert (tmp_path / "f").stat().st_size == 0


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_file_system_that_cannot_take_room_is_written_all_the_same(tmp_path, refusing, code):
    refusing(code)
    part = PartFile(tmp_path / "f", 5000)
    part.append(bytes(5000))
    assert part.finish() == 5000


def test_room_is_really_taken(tmp_path):
    part = PartFile(tmp_path / "f", 1 << 20)
    taken = (tmp_path / "f").stat().st_blocks * 512
    part.close()
    if not part._is_direct:
        pytest.skip("this file system has no direct writes")
    assert taken >= 1 << 20


def test_bytes_that_belong_elsewhere_are_refused(tmp_path):
    part = PartFile(tmp_path / "f")
    with pytest.raises(AssertionError):
        part.take(1, partfile.new_window(10), 10)
    part.close()
