"""Symbolic links in a checkpoint's folder: shards on another disk are read, names that lead out are not."""

import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import tensors, tree_digest, write_json, write_sharded, write_weights
from click.testing import CliRunner, Result

from surgery.cli import main

SHARD = "model-00002-of-00003.safetensors"
_OUT = "a file of the checkpoint, got a link out of it. Replace it by a copy."
_FOLDER = "a file, got a linked folder. Remove it, or replace it by a copy."
_NOWHERE = "a file, got a link to nothing. Remove it, or replace it by a copy."
_PIPE = "a file, got a FIFO. Remove it, or replace it by a copy."
_DEVICE = "a file, got a device. Remove it, or replace it by a copy."


def _run(*args: object) -> Result:
    return CliRunner().invoke(main, list(map(str, args)))


def _succeeded(*args: object) -> str:
    done = _run(*args)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def _move(file: Path, target: Path) -> None:
    """Put a file elsewhere, and link to it."""
    target.parent.mkdir(exist_ok=True)
    shutil.move(file, target)
    file.symlink_to(target)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder whose second shard, index and config lie on another disk, and `plain`, the same without links."""
    folder, disk = tmp_path / "linked", tmp_path / "disk"
    write_sharded(folder)
    write_json(folder / "config.json", {"model_type": "bert"})
    shutil.copytree(folder, tmp_path / "plain")
    for name in (SHARD, "config.json", "model.safetensors.index.json"):
        _move(folder / name, disk / f"other-{name}")
    return folder


def test_links_out_are_read_and_noted(linked: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain-out"
    printed = _succeeded("perturb", linked, "-o", out)
    _succeeded("perturb", tmp_path / "plain", "-o", plain)
    files = {name: digest for name, digest in tree_digest(out).items() if name not in ("surgery.json", "README.md")}
    assert files.items() <= tree_digest(plain).items()
    recipe, other = (json.loads((folder / "surgery.json").read_text()) for folder in (out, plain))
    noted = ("model.safetensors.index.json", SHARD, "config.json")
    assert recipe["notes"] == [f"{name} is a link to {tmp_path}/disk/other-{name}" for name in noted]
    assert other["notes"] == []
    assert all(" ".join(printed.split()).count(f"{name} is a link to") == 1 for name in noted)
    for source in (linked, tmp_path / "plain"):  # the recipe's notes are kept where there are no links
        assert "is bit for bit equal" in _succeeded("verify", out, "--source", source)
        _succeeded("materialize", out, "-o", tmp_path / f"again-{source.name}", "--source", source)
        assert tree_digest(tmp_path / f"again-{source.name}") == tree_digest(out)


def test_links_out_are_inspected_and_compared(linked: Path, tmp_path: Path) -> None:
    plain = json.loads(_succeeded("inspect", tmp_path / "plain", "--json", "--stats"))
    there = json.loads(_succeeded("inspect", linked, "--json", "--stats"))
    assert there | {"source": ""} == plain | {"source": ""}
    assert _run("diff", linked, tmp_path / "plain").exit_code == 0


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("extra.safetensors", ""),
        ("model.fp16.safetensors", f"{{source}}/model.fp16.safetensors: expected {_OUT}"),
        ("sub/extra.safetensors", f"{{source}}/sub/extra.safetensors: expected {_OUT}"),
        ("../disk/extra.safetensors", "{source}/model.safetensors.index.json: expected shards of its own folder, got "
         "'../disk/extra.safetensors'. Do not trust this checkpoint."),
    ],
    ids=["listed too", "listed and left out", "in another folder", "out of the folder"],
)  # fmt: skip
def test_index_may_name_only_links_that_a_listing_takes(shard: str, message: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_weights(tmp_path / "disk/extra.safetensors")
    if not shard.startswith(".."):
        (source / shard).parent.mkdir(parents=True)
        (source / shard).symlink_to(tmp_path / "disk/extra.safetensors")
    write_json(source / "model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors(), shard)})
    for command in (["perturb", source, "-o", tmp_path / "out"], ["inspect", source]):
        done = _run(*command)
        assert done.stderr == (f"error: {message.format(source=source)}\n" if message else "")
        assert done.exit_code == bool(message)
    assert (tmp_path / "out").exists() == (not message)


_LINKS = {
    "folder out": ("1_Pooling", "..", _FOLDER),
    "folder within": ("1_Pooling", "2_Real", _FOLDER),
    "nowhere": ("vocab.txt", "nothing", _NOWHERE),
    "itself": ("vocab.txt", "vocab.txt", _NOWHERE),
    "index nowhere": ("model.safetensors.index.json", "../nothing", _NOWHERE),
    "pipe": ("vocab.txt", "../pipe", _PIPE),
    "device": ("vocab.txt", "/dev/null", _DEVICE),
}


@pytest.mark.parametrize(("name", "target", "message"), _LINKS.values(), ids=_LINKS)
def test_link_to_no_file_is_refused(name: str, target: str, message: str, source: Path, tmp_path: Path) -> None:
    write_json(source / "2_Real/config.json", {})
    os.mkfifo(tmp_path / "pipe")
    if name.endswith("index.json"):
        (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / name).symlink_to(target)
    done = _run("perturb", source, "-o", tmp_path / "out")
    assert (done.exit_code, done.stderr) == (1, f"error: {source / name}: expected {message}\n")
    assert not (tmp_path / "out").exists()


def test_shard_behind_a_linked_folder_is_refused(source: Path, tmp_path: Path) -> None:
    write_weights(tmp_path / "other/model-00001-of-00001.safetensors")
    (source / "model.safetensors").unlink()
    (source / "sub").symlink_to("../other")
    shard = "sub/model-00001-of-00001.safetensors"
    write_json(source / "model.safetensors.index.json", {"weight_map": {"dense.weight": shard}})
    done = _run("perturb", source, "-o", tmp_path / "out")
    assert (done.exit_code, done.stderr) == (1, f"error: {source / shard}: expected {_OUT}\n")


def test_link_within_the_checkpoint_is_followed_without_a_note(source: Path, tmp_path: Path) -> None:
    (source / "vocab.json").symlink_to("tokenizer.json")
    out = tmp_path / "out"
    _succeeded("perturb", source, "-o", out)
    assert not (out / "vocab.json").is_symlink()
    assert (out / "vocab.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((out / "surgery.json").read_text())["notes"] == []


def test_links_of_the_hubs_cache_are_no_note(tmp_path: Path) -> None:
    model = tmp_path / "hub/models--org--tiny"
    snapshot = model / "snapshots" / ("a" * 40)
    write_weights(tmp_path / "hub/blobs/ab/shared")
    write_json(model / "blobs/c0", {"model_type": "bert"})
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../../blobs/ab/shared")
    (snapshot / "config.json").symlink_to("../../blobs/c0")
    _succeeded("perturb", snapshot, "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out/surgery.json").read_text())["notes"] == []
