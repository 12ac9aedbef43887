"""Sources that are replaced, cut or rewritten between planning and reading, or while they are read, are refused."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_json, write_sharded, write_weights
from click.testing import CliRunner
from safetensors.numpy import save, save_file

from surgery import perturb_checkpoint
from surgery.checkpoint.at_rest import Stamp, refuse_changed
from surgery.checkpoint.pickles import PickleFile
from surgery.checkpoint.resolve import resolve
from surgery.checkpoint.tensorfile import TensorFile
from surgery.checkpoint.weight_file import open_weights
from surgery.cli import main
from surgery.errors import SourceError
from surgery.noisytune import NoisyTune
from surgery.perturb.execute import execute
from surgery.perturb.output import is_finished
from surgery.perturb.plan import make_plan

_SHARD = "model-00002-of-00003.safetensors"
_CHANGED = "expected a file at rest, got one that changed while it was read. Run again."
_REMOVED = "expected a file at rest, got one that was removed meanwhile. Run again."


def _put(path: Path, content: bytes) -> None:
    """Replace a file as downloads do."""
    path.with_name("new").write_bytes(content)
    path.with_name("new").replace(path)


def _put_with_the_old_times(path: Path, content: bytes) -> None:
    stat = path.stat()
    assert len(content) == stat.st_size
    _put(path, content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _write_in_place(path: Path, content: bytes) -> None:
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    with path.open("r+b") as file:
        file.write(content)


def _other(path: Path) -> bytes:
    """The same header, other weights."""
    whole = bytearray(path.read_bytes())
    whole[-4:] = np.float32(0.5).tobytes()
    return bytes(whole)


_F32 = np.ones((16, 8), np.float32)
_CHANGES: dict[str, Callable[[Path], object]] = {
    "another shard": lambda path: shutil.copy(path.with_name(_SHARD.replace("2", "1", 1)), path),
    "another shape": lambda path: _put(path, save({"layer.2.weight": _F32.T.copy(), "layer.2.bias": _F32[0]})),
    "integers": lambda path: _put(path, save({"layer.2.weight": _F32.astype(np.int32), "layer.2.bias": _F32[0]})),
    "one more tensor": lambda path: save_file({"layer.2.weight": _F32, "x": _F32}, path),
    "other weights": lambda path: _put(path, _other(path)),
    "other weights in place": lambda path: _write_in_place(path, _other(path)),
    "other weights, the old times": lambda path: _put_with_the_old_times(path, _other(path)),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 8),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_shard_that_changes_after_planning_is_refused(change: Callable[[Path], object], tmp_path: Path) -> None:
    write_sharded(tmp_path / "source")
    plan = make_plan(tmp_path / "source", tmp_path / "out", NoisyTune())
    change(tmp_path / "source" / _SHARD)
    with pytest.raises(SourceError) as error:
        execute(plan)
    assert str(error.value) == f"{tmp_path}/source/{_SHARD}: {_CHANGED}"
    assert not is_finished(tmp_path / "out")
    assert not (tmp_path / "out/surgery.json").exists()
    assert not (tmp_path / "out" / _SHARD).exists()


def test_shard_that_vanishes_after_planning_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path / "source")
    plan = make_plan(tmp_path / "source", tmp_path / "out", NoisyTune())
    (tmp_path / "source" / _SHARD).rename(tmp_path / "elsewhere")
    with pytest.raises((SourceError, OSError)):
        execute(plan)
    assert not is_finished(tmp_path / "out")


def test_companion_that_changes_after_planning_is_refused(source: Path, tmp_path: Path) -> None:
    """Else a config that says quantized would come to lie beside weights that are not."""
    plan = make_plan(source, tmp_path / "out", NoisyTune())
    write_json(source / "config.json", {"quantization_config": {"quant_method": "x"}})
    with pytest.raises(SourceError) as error:
        execute(plan)
    assert str(error.value) == f"{source}/config.json: {_CHANGED}"
    assert not is_finished(tmp_path / "out")


@pytest.mark.parametrize("kind", [TensorFile, PickleFile], ids=["safetensors", "pickle"])
def test_file_replaced_while_it_is_read_is_refused_at_closing(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind is TensorFile:
        write_weights(path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({"w": torch.ones(4)}, path)
    file = kind(path, label="x")
    _put(path, path.read_bytes())
    with pytest.raises(SourceError) as error:
        file.settle("")
    assert str(error.value) == f"{path}: {_CHANGED}"
    path.unlink()
    with pytest.raises(SourceError) as error:
        file.settle("")
    assert str(error.value) == f"{path}: {_REMOVED}"
    file.close()


def test_file_replaced_while_it_is_opened_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header would be the one file's and its bytes the other's."""
    from surgery.checkpoint import tensorfile

    read = tensorfile.read_header

    def read_and_replace(path: Path, *, label: str) -> Any:
        header = read(path, label=label)
        _put(path, path.read_bytes())
        return header

    checkpoint = resolve(source)
    monkeypatch.setattr(tensorfile, "read_header", read_and_replace)
    with pytest.raises(SourceError, match="changed while it was read"):
        open_weights(checkpoint, "model.safetensors")


_COMMANDS = {
    "perturb": ["perturb", "source", "-o", "new"],
    "materialize": ["materialize", "out", "-o", "new"],
    "verify": ["verify", "out"],
    "inspect": ["inspect", "source", "--stats"],
    "diff": ["diff", "source", "out"],
}


@pytest.mark.parametrize("change", [_CHANGES["other weights"], _CHANGES["other weights in place"]], ids=["new", "same"])
@pytest.mark.parametrize("args", _COMMANDS.values(), ids=_COMMANDS)
def test_command_refuses_a_source_that_changes_under_it(
    args: list[str], change: Callable[[Path], object], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    perturb_checkpoint("source", "out")
    path, read, once = source / "model.safetensors", TensorFile.read_into, threading.Lock()

    def read_and_change(self: TensorFile, *rest: Any) -> None:
        read(self, *rest)
        if self.path == path and once.acquire(blocking=False):  # never released
            change(path)

    monkeypatch.setattr(TensorFile, "read_into", read_and_change)
    ran = CliRunner().invoke(main, args)
    assert (ran.exit_code, ran.stdout, ran.stderr) == (
        4 if args[0] == "verify" else 1,
        "",
        f"error: {path}: {_CHANGED}\n",
    )
    assert once.locked()
    assert not is_finished(tmp_path / "new")


def test_other_links_and_modes_are_no_change(source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    then = Stamp.of(path)
    os.link(path, tmp_path / "link")
    path.chmod(0o600)
    assert Stamp.of(path) != then
    refuse_changed(path, then)


def test_inode_alone_is_no_change() -> None:
    """Some network file systems number a file anew at each opening."""
    then = Stamp(1, 2, 3, (4, 5))
    assert then.is_same(Stamp(1, 2, 3, (4, 6)))
    assert not then.is_same(Stamp(1, 2, 9, (4, 6)))
    assert not then.is_same(Stamp(2, 2, 3, (4, 5)))
    assert not then.is_same(Stamp(1, 3, 3, (4, 5)))


def test_plan_of_other_tensors_is_refused(source: Path, tmp_path: Path) -> None:
    """A file that was written to in place, with its times put back, still has another header."""
    plan = make_plan(source, tmp_path / "out", NoisyTune())
    path = source / "model.safetensors"
    stat, whole = path.stat(), path.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    assert "dense.weight" in header
    path.write_bytes(whole.replace(b"dense.weight", b"dense.weighs"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SourceError, match="expected the tensors that were planned, got others"):
        execute(plan)
