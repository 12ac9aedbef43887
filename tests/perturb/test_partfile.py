"""Files written past the page cache: the same bytes, whatever their size and the file system."""

import os
import stat

import numpy as np
import pytest

from surgery.perturb import partfile
from surgery.perturb.partfile import PartFile

BUFFER = partfile._BUFFER
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
    part.append(memoryview(bytes(BUFFER)))  # on its way: the next call hears of it
    with pytest.raises(OSError, match="No space left"):
        part.append(memoryview(bytes(BUFFER))) if when == "append" else part.finish()
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
