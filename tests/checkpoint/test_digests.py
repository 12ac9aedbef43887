"""Digests of source files are remembered, and forgotten as soon as the file may have changed."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from surgery import SourceError
from surgery.checkpoint import digests
from surgery.checkpoint.digests import recall, remember, sha256_of
from surgery.checkpoint.tensorfile import TensorFile, build_header


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A file that counts as at rest though it was just written."""
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def test_digest_is_remembered(settled):
    assert recall(settled) is None
    assert sha256_of(settled) == hashlib.sha256(b"content").hexdigest()
    assert recall(settled) == hashlib.sha256(b"content").hexdigest()


def test_remembered_digest_is_used(settled):
    remember(settled, "0" * 64, settled.stat())
    assert sha256_of(settled) == "0" * 64


def change_content(path):
    path.write_bytes(b"CONTENT")


def change_content_keeping_mtime(path):
    """As rsync and tar do; the time of the change itself cannot be set back."""
    stat = path.stat()
    time.sleep(0.02)
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_file(path):
    other = path.with_name("other")
    other.write_bytes(b"CONTENT")
    other.replace(path)


@pytest.mark.parametrize("change", [change_content, change_content_keeping_mtime, replace_file])
def test_changed_file_is_hashed_again(settled, change):
    sha256_of(settled)
    time.sleep(0.02)
    change(settled)
    assert recall(settled) is None
    assert sha256_of(settled) == hashlib.sha256(b"CONTENT").hexdigest()


def test_file_just_written_is_not_remembered(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    sha256_of(path)
    assert recall(path) is None


def test_file_that_changed_since_it_was_read_is_not_remembered(settled):
    stat = settled.stat()
    time.sleep(0.02)
    settled.write_bytes(b"CONTENT")
    remember(settled, "0" * 64, stat)
    assert recall(settled) is None


@pytest.mark.parametrize("cache", ["a file", "nowhere"])
def test_no_cache_folder_only_costs_time(settled, tmp_path, monkeypatch, cache):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken") if cache == "a file" else "/proc/nowhere")
    assert sha256_of(settled) == hashlib.sha256(b"content").hexdigest()
    assert recall(settled) is None


def test_source_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    header = build_header([("w", "F32", (4,))], {})
    path.write_bytes(header.raw + bytes(16))
    source = TensorFile(path, label=str(path))
    time.sleep(0.02)
    path.write_bytes(header.raw + bytes(15) + b"x")
    with pytest.raises(SourceError, match="expected a file at rest, got one that changed while it was read"):
        source.settle("0" * 64)
    source.close()


def test_ctrl_c_does_not_wait_for_a_large_file(tmp_path):
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    code = f"""
from pathlib import Path
from surgery.checkpoint.digests import sha256_of_all
print("begun", flush=True)
sha256_of_all([Path({str(tmp_path / "large")!r})], "hashing")
"""
    hashing = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hashing.stdout.readline() == "begun\n"
    time.sleep(0.5)
    hashing.send_signal(signal.SIGINT)
    _, err = hashing.communicate(timeout=5)
    assert err.endswith("KeyboardInterrupt\n")
