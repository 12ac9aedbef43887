"""The output folder on a store: complete objects only, resumable, locked, and never at the cost of what is not ours."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
from checkpoints import tree_digest, write_json, write_sharded
from click.testing import CliRunner
from safetensors.numpy import save_file

from surgery import materialize_checkpoint, perturb_checkpoint, verify_checkpoint
from surgery.checkpoint.resolve import resolve
from surgery.cli import main
from surgery.errors import OutputError, SettingError, SourceError
from surgery.storage.store import Store

MEMORY = fsspec.filesystem("memory", use_listings_cache=False)  # the very one that is used
JOURNAL, RECORDS = "surgery.unfinished.json", "surgery.unfinished/"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_sharded(tmp_path / "model")
    write_json(tmp_path / "model/config.json", {"model_type": "bert", "note": "a"})
    return tmp_path / "model"


@pytest.fixture
def expected(source) -> dict[str, str]:
    """What is written to a disk, by name."""
    perturb_checkpoint(source, source.parent / "expected", seed=7)
    return tree_digest(source.parent / "expected")


@pytest.fixture
def out(tmp_path) -> str:
    return f"memory://{tmp_path.name}/out"


def names(url: str) -> set[str]:
    root = f"/{url.removeprefix('memory://')}/"
    return {path.removeprefix(root) for path in MEMORY.find(root)}


def read(url: str, name: str) -> bytes:
    data: bytes = MEMORY.cat_file(f"/{url.removeprefix('memory://')}/{name}")
    return data


def write(url: str, name: str, data: bytes) -> None:
    MEMORY.pipe_file(f"/{url.removeprefix('memory://')}/{name}", data)


def digests(url: str, folder: Path) -> dict[str, str]:
    """Bring a folder here; return the digests of its files."""
    for name in names(url):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(read(url, name))
    return tree_digest(folder)


class Killed(BaseException):
    """What nothing catches, as nothing would catch SIGKILL."""


@contextmanager
def killed_at(monkeypatch, part: str) -> Iterator[None]:
    """End a run as it writes a small object whose name holds `part`."""
    put = Store.write

    def write(self, name, data):
        if part in name:
            raise Killed
        put(self, name, data)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(Store, "write", write)
        yield
        raise AssertionError


def test_the_bytes_are_those_on_a_disk(source, expected, out, tmp_path):
    recipe = perturb_checkpoint(source, out, seed=7)
    assert digests(out, tmp_path / "found") == expected
    assert recipe.source == str(source)


def test_nothing_but_the_checkpoint_is_left(source, expected, out):
    perturb_checkpoint(source, out, seed=7)
    assert names(out) == expected.keys()


@pytest.mark.parametrize(
    "options",
    [{"scale": "global"}, {"rounding": "stochastic"}, {"workers": 1}, {"include": "layer.1.weight"}],
    ids=["global", "stochastic", "one thread", "include"],
)
def test_settings_are_taken(source, out, tmp_path, options):
    perturb_checkpoint(source, out, **options)
    perturb_checkpoint(source, tmp_path / "disk", **options)
    assert digests(out, tmp_path / "found") == tree_digest(tmp_path / "disk")
    assert verify_checkpoint(out).is_equal


@pytest.mark.sweep
def test_a_pickle_of_a_disk_becomes_safetensors_on_a_store(out, tmp_path):
    import torch

    (tmp_path / "m").mkdir()
    torch.save({"a.weight": torch.randn(8, 8)}, tmp_path / "m/pytorch_model.bin")
    perturb_checkpoint(tmp_path / "m", out)
    assert "model.safetensors" in names(out)
    assert verify_checkpoint(out).is_equal


def test_the_recipe_alone(source, out):
    perturb_checkpoint(source, out, recipe_only=True)
    assert names(out) == {"surgery.json", "README.md", "config.json"}
    assert materialize_checkpoint(out, f"{out}-weights")
    assert verify_checkpoint(f"{out}-weights").is_equal


def test_the_same_command_again_finds_it_done(source, out, monkeypatch):
    first = perturb_checkpoint(source, out)
    monkeypatch.setattr(Store, "write", None)
    assert perturb_checkpoint(source, out) == first


@pytest.mark.parametrize("moment", [f"{RECORDS}{SHARDS[1]}", "index.json", "README.md", "/surgery.json"])
def test_a_killed_run_is_finished_by_the_same_command(source, expected, out, tmp_path, monkeypatch, moment):
    with killed_at(monkeypatch, moment.removeprefix("/")):
        perturb_checkpoint(source, out, seed=7, workers=1)
    assert JOURNAL in names(out)
    assert "surgery.json" not in names(out)
    with pytest.raises(SourceError, match="expected a finished checkpoint"):
        resolve(out)
    perturb_checkpoint(source, out, seed=7)
    assert digests(out, tmp_path / "found") == expected


def test_finished_shards_are_not_written_again(source, expected, out, tmp_path, monkeypatch):
    with killed_at(monkeypatch, f"{RECORDS}{SHARDS[2]}"):
        perturb_checkpoint(source, out, seed=7, workers=1)
    path = f"/{out.removeprefix('memory://')}/{SHARDS[0]}"
    before = MEMORY.info(path)
    perturb_checkpoint(source, out, seed=7)
    assert MEMORY.info(path) == before
    assert digests(out, tmp_path / "found") == expected


def test_a_shard_that_was_altered_since_is_written_again(source, expected, out, tmp_path, monkeypatch):
    with killed_at(monkeypatch, "README.md"):
        perturb_checkpoint(source, out, seed=7)
    data = bytearray(read(out, SHARDS[0]))
    data[-1] ^= 1
    write(out, SHARDS[0], bytes(data))
    perturb_checkpoint(source, out, seed=7)
    assert digests(out, tmp_path / "found") == expected


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_record_is_none(source, expected, out, tmp_path, monkeypatch, damage):
    with killed_at(monkeypatch, "README.md"):
        perturb_checkpoint(source, out, seed=7)
    write(out, f"{RECORDS}{SHARDS[0]}.json", damage)
    perturb_checkpoint(source, out, seed=7)
    assert digests(out, tmp_path / "found") == expected


def test_another_command_on_an_unfinished_folder_is_refused(source, out, monkeypatch):
    with killed_at(monkeypatch, "README.md"):
        perturb_checkpoint(source, out, seed=7)
    with pytest.raises(OutputError) as refused:
        perturb_checkpoint(source, out, seed=8)
    assert str(refused.value).startswith(
        f"{out}: expected a new or empty folder, got one that another command did not finish. Finish it with `surgery "
        f"perturb {source} --lam 0.15 --seed 7 -o {out}`"
    )
    perturb_checkpoint(source, out, seed=8, overwrite=True)
    assert verify_checkpoint(out).is_equal


def test_a_source_that_changed_since_is_refused(source, out, monkeypatch):
    with killed_at(monkeypatch, "README.md"):
        perturb_checkpoint(source, out)
    path = source / SHARDS[0]
    path.write_bytes(path.read_bytes())
    with pytest.raises(OutputError, match="expected the source as it was when this run began"):
        perturb_checkpoint(source, out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_anything_else_is_refused(source, out, overwrite):
    write(out, "thesis.txt", b"mine")
    with pytest.raises(OutputError, match=r"got 1 files, such as 'thesis.txt'. Choose another with `out`."):
        perturb_checkpoint(source, out, overwrite=overwrite)
    assert names(out) == {"thesis.txt"}


def test_overwrite_leaves_no_stale_shard(source, out, tmp_path):
    perturb_checkpoint(source, out)
    (tmp_path / "single").mkdir()
    (tmp_path / "single/model.safetensors").write_bytes((source / SHARDS[0]).read_bytes())
    with pytest.raises(OutputError, match="Replace it with `overwrite`, or use `out`"):
        perturb_checkpoint(tmp_path / "single", out)
    perturb_checkpoint(tmp_path / "single", out, overwrite=True)
    assert names(out) == {"model.safetensors", "README.md", "surgery.json"}
    assert verify_checkpoint(out).is_equal


def test_an_edited_card_is_spared(source, out):
    perturb_checkpoint(source, out)
    write(out, "README.md", b"mine")
    with pytest.raises(OutputError, match=r"README.md: expected the card that was written here, got one edited since"):
        perturb_checkpoint(source, out, seed=1, overwrite=True)
    assert read(out, "README.md") == b"mine"


def test_two_runs_at_once_are_one_and_a_refusal(source, out):
    from surgery.perturb.remote_output import RemoteOutput
    from surgery.storage.url import find_url

    with (
        RemoteOutput(find_url(out), {}, "", {}, lambda *_: False).claim(overwrite=False),
        pytest.raises(OutputError, match="expected a folder for this run alone, got one that"),
    ):
        perturb_checkpoint(source, out)


def test_an_error_leaves_no_object_half_sent(source, out):
    tensors = {"layer.1.weight": np.full((16, 8), np.nan, np.float32), "layer.1.bias": np.zeros(8, np.float32)}
    save_file(tensors, source / SHARDS[0], metadata={"format": "pt"})
    with pytest.raises(SourceError, match="NaN"):
        perturb_checkpoint(source, out, workers=1)
    assert names(out) == {JOURNAL}


@pytest.mark.parametrize("where", ["model", "model/out", ""], ids=["source", "inside", "around"])
def test_the_source_is_never_written_to(source, tmp_path, where):
    for path in source.iterdir():
        write(f"memory://{tmp_path.name}/model", path.name, path.read_bytes())
    with pytest.raises(OutputError, match="expected a folder outside the source, got one"):
        perturb_checkpoint(f"memory://{tmp_path.name}/model", f"memory://{tmp_path.name}/{where}", overwrite=True)


def test_materialize_refuses_the_folder_of_its_recipe(source, out):
    perturb_checkpoint(source, out)
    with pytest.raises(OutputError, match="expected another folder than the recipe's, got that one"):
        materialize_checkpoint(out, out)


def test_materialize_writes_the_same_bytes_from_store_to_store(source, out, tmp_path):
    there = f"memory://{tmp_path.name}/model"
    for path in source.iterdir():
        write(there, path.name, path.read_bytes())
    perturb_checkpoint(there, out)
    materialize_checkpoint(f"{out}/surgery.json", f"{out}-again")
    assert digests(f"{out}-again", tmp_path / "again") == digests(out, tmp_path / "first")
    materialize_checkpoint(out, tmp_path / "disk")
    assert tree_digest(tmp_path / "disk") == tree_digest(tmp_path / "first")


@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
def test_materialize_refuses_another_source(source, out, tmp_path, name):
    there = f"memory://{tmp_path.name}/model"
    for path in source.iterdir():
        write(there, path.name, path.read_bytes())
    perturb_checkpoint(there, out)
    data = read(there, name)
    write(there, name, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(SourceError) as refused:
        materialize_checkpoint(out, f"{out}-again")
    assert str(refused.value).startswith(f"{there}/{name}: expected the recipe's source (blake3 ")
    assert not names(f"{out}-again")


def test_verify_names_what_differs(source, out):
    perturb_checkpoint(source, out)
    data = bytearray(read(out, SHARDS[1]))
    data[-1] ^= 1
    write(out, SHARDS[1], bytes(data))
    write(out, "config.json", b"{}")
    write(out, "model.bin", b"stale")
    MEMORY.rm_file(f"/{out.removeprefix('memory://')}/{SHARDS[2]}")
    found = verify_checkpoint(out)
    assert [(d.file, d.differing) for d in found.differences] == [(SHARDS[1], 1)]
    assert [fault.partition(":")[0] for fault in found.faults] == ["config.json", SHARDS[2], "model.bin"]
    assert found.folder == out


def test_verify_of_a_damaged_file_is_a_fault(source, out):
    perturb_checkpoint(source, out)
    write(out, SHARDS[1], read(out, SHARDS[1])[:-4])
    (fault,) = verify_checkpoint(out).faults
    assert fault.startswith(f"{SHARDS[1]}: expected ")


@pytest.mark.parametrize("place", ["nothing", "out/nothing.json"])
def test_no_recipe_is_one_line(source, out, tmp_path, place):
    perturb_checkpoint(source, out)
    with pytest.raises(SourceError, match=r"expected a surgery.json, or a folder that holds one, got none of them"):
        verify_checkpoint(f"memory://{tmp_path.name}/{place}")


def test_an_unfinished_folder_is_not_verified(source, out, monkeypatch):
    with killed_at(monkeypatch, "README.md"):
        perturb_checkpoint(source, out)
    with pytest.raises(SourceError, match="did not finish"):
        verify_checkpoint(out)


def test_the_journal_names_no_more_than_the_command(source, out, monkeypatch):
    with killed_at(monkeypatch, "README.md"):
        perturb_checkpoint(source, out)
    journal = json.loads(read(out, JOURNAL))
    assert journal.keys() == {"why", "resume", "job", "owned", "notes"}
    assert {name for name in names(out) if name.startswith(RECORDS)} == {f"{RECORDS}{name}.json" for name in SHARDS}


def test_the_command_line_takes_urls(source, out, tmp_path):
    words = ["perturb", str(source), "-o", f"{out}-{{seed}}", "--seed", "1..2", "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    variants = json.loads(done.output)["variants"]
    assert [one["out"] for one in variants] == [f"{out}-1", f"{out}-2"]
    assert variants[0]["next"] == f"surgery verify {out}-1"
    done = CliRunner().invoke(main, ["materialize", f"{out}-2", "-o", f"file://{tmp_path}/disk", "--json"])
    assert done.exit_code == 0, done.output
    assert tree_digest(tmp_path / "disk") == digests(f"{out}-2", tmp_path / "found")


def test_what_is_on_a_store_is_not_pushed(source, out):
    done = CliRunner().invoke(main, ["perturb", str(source), "-o", out, "--push", "me/noisy", "--dry-run"])
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: --push: expected a folder of this machine to push, got {out}. Leave one of them out.\n"
    )


def test_a_url_with_a_password_is_refused(source):
    with pytest.raises(SettingError, match="expected a URL without a password") as refused:
        perturb_checkpoint(source, "s3://me:s3cret@bucket/out")
    assert "s3cret" not in str(refused.value)


def test_a_url_as_a_path_is_refused(source):
    with pytest.raises(SettingError, match="expected a URL as str, got a Path"):
        perturb_checkpoint(source, Path("s3://bucket/out"))
