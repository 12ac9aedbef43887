"""Disks of all kinds under the output folder: without locks or syncs, with odd files in it, with short names only."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tree_digest, write_json, write_weights
from commands import Ran, clean_env, command
from helpers.faults import build, failing
from safetensors.numpy import save_file

from surgery.errors import OutputError
from surgery.lock import LOCK, lock_folder
from surgery.perturb.output import _part_names

JOURNAL = "surgery.unfinished.json"
Refuses = Callable[..., None]


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("faults"))


# -- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF], ids=errno.errorcode.get)
def test_disk_without_flock_is_no_other_run(
    code: int, faults: Path, run_cli: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    assert source.exists()
    ran = run_cli("perturb", "source", "-o", "out", env=failing(faults, "flock", code, tmp_path))
    assert (ran.code, ran.err) == (0, "")
    assert run_cli("perturb", "source", "-o", "fresh").code == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", fail)


_HOLDER = (
    "import errno, fcntl, sys, time\nfrom pathlib import Path\nfrom surgery.lock import lock_folder\n"
    "def fail(*_): raise OSError(errno.ENOSYS, 'none')\nfcntl.flock = fail\n"
    "with lock_folder(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path without flock."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.usefixtures("without_flock")
def test_another_run_is_refused_without_flock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    assert holder.poll() is None
    with pytest.raises(OutputError) as caught, lock_folder(tmp_path):
        pass
    assert str(caught.value) == (
        f"{tmp_path}: expected a folder for this run alone, got one that another run is writing to. Wait for it, or "
        f"choose another with `out`; if there is none on any host, remove {tmp_path / LOCK}."
    )


@pytest.mark.usefixtures("without_flock")
def test_lock_of_a_killed_run_is_taken_over(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with lock_folder(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


@pytest.mark.usefixtures("without_flock")
def test_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"{os.getpid()}\nelsewhere\n")
    with pytest.raises(OutputError, match="another run is writing to"), lock_folder(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


def test_lock_left_by_a_kill_is_no_stranger(run_cli: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    """The folder may be used on another host, or by a disk that has flock by now."""
    assert source.exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).write_text(f"1\n{socket.gethostname()}\n")
    assert run_cli("perturb", "source", "-o", "out").code == 0
    assert run_cli("verify", "out").code == 0
    again = run_cli("perturb", "out", "-o", "again", "--seed", "1")
    assert again.code == 0
    assert not (tmp_path / "again" / LOCK).exists()


def test_disk_without_any_lock_is_named(
    source: Path, tmp_path: Path, without_flock: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("filelock.SoftFileLock.acquire", fail)
    assert without_flock is None
    assert source.exists()
    with lock_folder(tmp_path):
        pass
    assert caplog.messages == [
        f"{tmp_path}: its file system has no locks (Function not implemented; Operation not permitted): let no other "
        "run write to it"
    ]


# -- what else a disk may not know ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("fsync", errno.EINVAL),
        ("fallocate", errno.EIO),
        ("statvfs", errno.ENOSYS),
        ("truncate", errno.EOPNOTSUPP),
    ],
)
def test_disk_that_knows_less_gets_the_same_bytes(
    call: str, code: int, faults: Path, run_cli: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    assert source.exists()
    below = failing(faults, call, code, tmp_path / "out")
    ran = run_cli("perturb", "source", "-o", "out", env=below)
    assert (ran.code, ran.err) == (0, "")
    assert run_cli("perturb", "source", "-o", "fresh").code == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_of_the_greatest_length_are_written(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    shard = "m" * (255 - len("-00001-of-00001.safetensors")) + "-00001-of-00001.safetensors"
    write_weights(tmp_path / "source" / shard)
    write_json(tmp_path / "source" / ("c" * 250 + ".json"), {})
    ran = run_cli("perturb", "source", "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    assert {shard, "c" * 250 + ".json"} < set(tree_digest(tmp_path / "out"))
    assert run_cli("verify", "out").code == 0


def test_path_of_the_greatest_length_is_written(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    write_weights(tmp_path / "source/model.safetensors")
    room = 4095 - len(str(tmp_path)) - len("/" + JOURNAL)
    out = tmp_path.joinpath(*["d" * 99] * (room // 100), "d" * (room % 100 - 1))
    assert len(str(out / JOURNAL)) == 4095
    ran = run_cli("perturb", "source", "-o", out)
    assert (ran.code, ran.err) == (0, "")
    assert run_cli("perturb", "source", "-o", "fresh").code == 0
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


def test_parts_with_short_names_are_those_of_the_run(run_cli: Callable[..., Ran], faults: Path, tmp_path: Path) -> None:
    shard = "m" * (255 - len(".safetensors")) + ".safetensors"
    write_weights(tmp_path / "source" / shard)
    part = tmp_path / "out" / _part_names(shard)[1]
    ran = run_cli("perturb", "source", "-o", "out", env=failing(faults, "write", errno.EIO, part))
    assert ran.err.startswith(f"error: {part}: expected a file that can be written, got Input/output error. ")
    assert (ran.code, set(tree_digest(tmp_path / "out"))) == (1, {JOURNAL})
    part.write_bytes(b"left by a kill")
    assert run_cli("perturb", "source", "-o", "out").code == 0
    assert set(tree_digest(tmp_path / "out")) == {shard, "README.md", "surgery.json"}


def test_name_too_long_for_the_output_is_refused_at_once(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    """A PyTorch file's name grows as it becomes safetensors."""
    import torch

    (tmp_path / "source").mkdir()
    stem = "m" * (255 - len("-00001-of-00001.bin")) + "-00001-of-00001"
    torch.save({"a.weight": torch.ones(8, 8).normal_()}, tmp_path / "source" / f"{stem}.bin")
    ran = run_cli("perturb", "source", "-o", "out")
    assert ran.err.startswith(
        f"error: {tmp_path}/out/{stem}.safetensors: expected a file that can be written, got File name too long."
    )
    assert (ran.code, tree_digest(tmp_path / "out")) == (1, {})


# -- what is no file --------------------------------------------------------------------------------------------------

_OURS = [
    *("surgery.json", JOURNAL, JOURNAL + ".surgery-part", "model.safetensors", "model.safetensors.surgery-part"),
    *("README.md", "config.json", "anything", LOCK),
]


def _make(kind: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(path.parent)
            server.bind(path.name)
    else:
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("devices are made by root")


@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize("name", _OURS)
def test_fifo_in_the_output_is_refused(
    name: str, option: list[str], refuses: Refuses, source: Path, tmp_path: Path
) -> None:
    assert source.exists()
    _make("a FIFO", tmp_path / "out" / name)
    refuses(
        f"{tmp_path}/out/{name}: expected a file, got a FIFO. Remove it, or choose another -o.",
        *("source", "-o", "out", *option),
    )


@pytest.mark.parametrize("kind", ["a socket", "a device"])
def test_what_is_no_file_in_the_output_is_refused(
    kind: str, refuses: Refuses, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source.exists()
    monkeypatch.chdir(tmp_path)
    _make(kind, tmp_path / "out/surgery.json")
    message = f"{tmp_path}/out/surgery.json: expected a file, got {kind}. Remove it, or choose another -o."
    refuses(message, "source", "-o", "out")


@pytest.mark.parametrize("name", ["model.safetensors", "surgery.json", JOURNAL, "README.md", "config.json"])
def test_folder_in_the_place_of_a_file_is_refused_at_once(
    name: str, refuses: Refuses, source: Path, tmp_path: Path
) -> None:
    assert source.exists()
    (tmp_path / "out" / name).mkdir(parents=True)
    refuses(f"{tmp_path}/out/{name}: expected a file or nothing, got a folder. Move it away.", "source", "-o", "out")


# -- few descriptors --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 shards."""
    root = tmp_path_factory.mktemp("many")
    weight_map = {}
    (root / "source").mkdir()
    for number in range(300):
        shard, name = f"model-{number + 1:05}-of-00300.safetensors", f"layer.{number}.weight"
        values = np.random.default_rng(number).standard_normal((4, 4)).astype(np.float32)
        save_file({name: values}, root / "source" / shard, metadata={"format": "pt"})
        weight_map[name] = shard
    write_json(root / "source/model.safetensors.index.json", {"weight_map": weight_map})
    return root


def _run_with_few(root: Path, files: int, *args: object) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    words = command(*args)
    return subprocess.run(words, cwd=root, env=clean_env(), preexec_fn=limit, capture_output=True, text=True)


def test_more_shards_than_descriptors(many: Path) -> None:
    for words in (
        *(("perturb", "source", "-o", "out"), ("verify", "out"), ("inspect", "source", "--stats")),
        *(("diff", "source", "out"), ("diff", "source", "out", "--workers", "16")),
    ):
        done = _run_with_few(many, 64, *words)
        assert (done.returncode, done.stderr) == (0, ""), words


@pytest.mark.parametrize("words", [("inspect", "source", "--stats"), ("perturb", "source", "-o", "few")], ids=" ".join)
def test_too_few_descriptors_are_one_line_with_the_limit(words: tuple[str, ...], many: Path) -> None:
    done = _run_with_few(many, 8, *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: /")
    assert "got Too many open files, of which this process may have 8 (ulimit -n). Raise that limit" in done.stderr
    assert done.stderr.count("\n") == 1
