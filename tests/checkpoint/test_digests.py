"""Digests of source files are remembered, and forgotten as soon as the file may have changed."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from blake3 import blake3

from surgery import SourceError
from surgery.checkpoint import digests
from surgery.checkpoint.digests import (
    BLAKE3,
    digest_of,
    digest_of_bytes,
    digest_of_list,
    digests_of,
    is_digest,
    new_digest,
    recall,
    remember,
)
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


# BLAKE3 as published, the first in its own test_vectors.json; hashlib has sha256
VECTORS = {
    b"": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    b"abc": "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
}
CONTENT = {
    "blake3": "blake3:" + blake3(b"content").hexdigest(),
    "sha256": "sha256:" + hashlib.sha256(b"content").hexdigest(),
}
ZEROS = "blake3:" + "0" * 64


@pytest.mark.parametrize("data", VECTORS, ids=["empty", "abc"])
def test_digest_is_the_published_one(data, tmp_path):
    (tmp_path / "file").write_bytes(data)
    expected = {"blake3": f"blake3:{VECTORS[data]}", "sha256": f"sha256:{hashlib.sha256(data).hexdigest()}"}
    assert digests_of(tmp_path / "file", ["blake3", "sha256"]) == expected
    for algorithm, digest in expected.items():
        hasher = new_digest(algorithm)
        for byte in data:
            hasher.update(bytes([byte]))
        assert hasher.text() == digest_of_bytes(data, algorithm) == digest


def test_digest_of_pieces_is_that_of_the_whole(tmp_path):
    """3 MB: more than one read of a file, and many chunks of BLAKE3's tree."""
    data = np.random.default_rng(0).bytes(3_000_001)
    (tmp_path / "file").write_bytes(data)
    hasher = new_digest("blake3")
    for start in range(0, len(data), 700_001):
        hasher.update(memoryview(data)[start : start + 700_001])
    expected = f"blake3:{blake3(data).hexdigest()}"
    assert hasher.text() == digest_of(tmp_path / "file", "blake3") == expected


def test_large_update_releases_the_gil():
    """The thread that waits runs before the update ends, though the interpreter itself would never switch to it."""
    interval = sys.getswitchinterval()
    begun, ran = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (begun.set(), ran.wait(0.001), ran.set()))
    piece, hasher = memoryview(bytearray(2 << 20)), new_digest("blake3")
    sys.setswitchinterval(1000)
    try:
        thread.start()
        begun.wait()
        updates = 0
        while not ran.is_set() and updates < 1000:
            hasher.update(piece)
            updates += 1
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert updates < 1000


def test_digest_of_several_files_is_that_of_their_list(tmp_path):
    """As `b3sum a b | b3sum` and `sha256sum a b | sha256sum` print it."""
    digests = {tmp_path / "a": f"blake3:{VECTORS[b'']}", tmp_path / "b": f"blake3:{VECTORS[b'abc']}"}
    listed = f"{VECTORS[b'']}  a\n{VECTORS[b'abc']}  b\n".encode()
    assert digest_of_list(digests) == f"blake3:{blake3(listed).hexdigest()}"
    digests = dict.fromkeys(digests, CONTENT["sha256"])
    listed = "".join(f"{CONTENT['sha256'][7:]}  {name}\n" for name in "ab").encode()
    assert digest_of_list(digests) == f"sha256:{hashlib.sha256(listed).hexdigest()}"
    assert digest_of_list({tmp_path / "a": ZEROS}) == ZEROS


@pytest.mark.parametrize(
    "text",
    ["", "0" * 64, "md5:" + "0" * 64, "blake3:" + "0" * 63, "blake3:" + "0" * 65, "blake3:" + "A" * 64, f"{ZEROS}\n"],
    ids=["empty", "bare", "unknown", "short", "long", "upper case", "newline"],
)
def test_what_is_no_digest(text, settled):
    """Nor is it believed where the cache has it."""
    assert not is_digest(text)
    remember(settled, ZEROS, settled.stat())
    (entry,) = settled.parent.glob("cache/model-surgery/digests/*")
    entry.write_text(text)
    assert recall(settled, "blake3") is None
    assert digest_of(settled, "blake3") == CONTENT["blake3"]
    assert entry.read_text() == CONTENT["blake3"]


@pytest.mark.parametrize("damage", ["other algorithm", "no text", "folder"])
def test_damaged_entry_of_the_cache_is_computed_again(damage, settled):
    remember(settled, ZEROS, settled.stat())
    (entry,) = settled.parent.glob("cache/model-surgery/digests/*")
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_bytes(b"\xff" * 71 if damage == "no text" else CONTENT["sha256"].encode())
    assert recall(settled, "blake3") is None
    assert digest_of(settled, "blake3") == CONTENT["blake3"]


@pytest.mark.parametrize("algorithm", CONTENT)
def test_digest_is_remembered(algorithm, settled):
    assert recall(settled, algorithm) is None
    assert digest_of(settled, algorithm) == CONTENT[algorithm]
    assert recall(settled, algorithm) == CONTENT[algorithm]


def test_digests_of_both_algorithms_are_remembered_side_by_side(settled):
    assert digests_of(settled, ["blake3", "sha256"]) == CONTENT
    assert {algorithm: recall(settled, algorithm) for algorithm in CONTENT} == CONTENT


def test_remembered_digest_is_used(settled):
    remember(settled, ZEROS, settled.stat())
    assert digest_of(settled, "blake3") == ZEROS
    assert digests_of(settled, ["blake3", "sha256"]) == {"blake3": ZEROS, "sha256": CONTENT["sha256"]}


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
    digest_of(settled, "blake3")
    time.sleep(0.02)
    change(settled)
    assert recall(settled, "blake3") is None
    assert digest_of(settled, "blake3") == f"blake3:{blake3(b'CONTENT').hexdigest()}"


def test_file_just_written_is_not_remembered(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    digest_of(path, "blake3")
    assert recall(path, "blake3") is None


def test_file_that_changed_since_it_was_read_is_not_remembered(settled):
    stat = settled.stat()
    time.sleep(0.02)
    settled.write_bytes(b"CONTENT")
    remember(settled, ZEROS, stat)
    assert recall(settled, "blake3") is None


@pytest.mark.parametrize("cache", ["a file", "nowhere"])
def test_no_cache_folder_only_costs_time(settled, tmp_path, monkeypatch, cache):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken") if cache == "a file" else "/proc/nowhere")
    assert digest_of(settled, "blake3") == CONTENT["blake3"]
    assert recall(settled, "blake3") is None


def test_source_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    header = build_header([("w", "F32", (4,))], {})
    path.write_bytes(header.raw + bytes(16))
    source = TensorFile(path, label=str(path))
    time.sleep(0.02)
    path.write_bytes(header.raw + bytes(15) + b"x")
    with pytest.raises(SourceError, match="expected a file at rest, got one that changed while it was read"):
        source.settle(ZEROS)
    source.close()


def test_ctrl_c_does_not_wait_for_a_large_file(tmp_path):
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    code = f"""
from pathlib import Path
from surgery.checkpoint.digests import digests_of_all
print("begun", flush=True)
digests_of_all({{Path({str(tmp_path / "large")!r}): ["blake3"]}}, "hashing")
"""
    hashing = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hashing.stdout.readline() == "begun\n"
    time.sleep(0.5)
    hashing.send_signal(signal.SIGINT)
    _, err = hashing.communicate(timeout=5)
    assert err.endswith("KeyboardInterrupt\n")


def _planted(folder, settled):
    """Remember a digest, and write another in its place, as another user might."""
    remember(settled, digest_of_bytes(b"content", BLAKE3), settled.stat())
    (entry,) = (folder / "model-surgery/digests").iterdir()
    entry.write_text(f"blake3:{'0' * 64}")
    return entry


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666], ids=oct)
def test_entry_that_others_may_write_is_not_believed(settled, tmp_path, mode):
    entry = _planted(tmp_path / "cache", settled)
    assert recall(settled, BLAKE3) == f"blake3:{'0' * 64}"
    entry.chmod(mode)
    assert recall(settled, BLAKE3) is None
    assert digest_of(settled, BLAKE3) == digest_of_bytes(b"content", BLAKE3)


@pytest.mark.parametrize("name", ["model-surgery", "model-surgery/digests"])
def test_folder_that_others_may_write_is_not_used(settled, tmp_path, name):
    _planted(tmp_path / "cache", settled)
    (tmp_path / "cache" / name).chmod(0o775)
    assert recall(settled, BLAKE3) is None


@pytest.mark.parametrize("name", ["model-surgery", "model-surgery/digests", "the entry"])
def test_what_another_user_owns_is_not_believed(settled, tmp_path, name):
    entry = _planted(tmp_path / "cache", settled)
    if os.geteuid():
        pytest.skip("files are given away by root")
    os.chown(entry if name == "the entry" else tmp_path / "cache" / name, 1, 1)
    assert recall(settled, BLAKE3) is None


@pytest.mark.parametrize("kind", ["FIFO", "link", "folder"])
def test_entry_that_is_no_file_is_not_waited_for(settled, tmp_path, kind):
    entry = _planted(tmp_path / "cache", settled)
    kept = entry.rename(tmp_path / "elsewhere")
    {"FIFO": os.mkfifo, "link": lambda path: path.symlink_to(kept), "folder": os.mkdir}[kind](entry)
    assert recall(settled, BLAKE3) is None
    assert digest_of(settled, BLAKE3) == digest_of_bytes(b"content", BLAKE3)


def test_relative_cache_is_none(settled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    remember(settled, digest_of_bytes(b"content", BLAKE3), settled.stat())
    assert not (tmp_path / "relative").exists()
    assert (tmp_path / "home/.cache/model-surgery/digests").is_dir()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_cache_that_cannot_be_written_only_costs_time(settled, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(f"pathlib.Path.{name}", fail)
        assert digest_of(settled, BLAKE3) == digest_of_bytes(b"content", BLAKE3)
    assert recall(settled, BLAKE3) is None
