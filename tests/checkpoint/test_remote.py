"""Checkpoints by URL: the same as from a disk, by ranges, at rest or refused."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from checkpoints import raw_safetensors, tree_digest, write_json, write_sharded, write_weights
from hub import Hub

from surgery import diff_checkpoints, inspect_checkpoint, perturb_checkpoint
from surgery.checkpoint.resolve import resolve
from surgery.checkpoint.weight_file import digests_of_sources, open_weights
from surgery.errors import SettingError, SourceError
from surgery.report import inspect as report

MEMORY = fsspec.filesystem("memory", use_listings_cache=False)  # the very one that is used


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    """A checkpoint of three shards on a disk, whose copy `upload` makes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_sharded(tmp_path / "model")
    write_json(tmp_path / "model/config.json", {"model_type": "bert"})
    (tmp_path / "model/README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model/1_Pooling").mkdir()
    write_json(tmp_path / "model/1_Pooling/config.json", {"pooling": "mean"})
    return tmp_path / "model"


def upload(folder: Path, place: str) -> str:
    """Copy a folder to the store of this process; return its URL."""
    for path in folder.rglob("*"):
        if path.is_file():
            MEMORY.pipe_file(f"/{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"memory://{place}"


@pytest.fixture
def url(sharded) -> str:
    return upload(sharded, f"{sharded.parent.name}/model")


def reads(monkeypatch) -> list[tuple[str, int, int]]:
    """Note which ranges of which objects are read."""
    found = []
    cat_file = MEMORY.cat_file

    def noting(path, start=None, end=None):
        found.append((path.rpartition("/")[2], start, end))
        return cat_file(path, start=start, end=end)

    monkeypatch.setattr(MEMORY, "cat_file", noting)
    return found


def test_the_bytes_are_those_from_a_disk(sharded, url, tmp_path):
    recipe = perturb_checkpoint(url, tmp_path / "out", seed=3)
    perturb_checkpoint(sharded, tmp_path / "expected", seed=3)
    found, expected = tree_digest(tmp_path / "out"), tree_digest(tmp_path / "expected")
    assert {name for name in expected if found.get(name) != expected[name]} == {"surgery.json"}
    assert found.keys() == expected.keys()
    assert recipe.source == url
    assert recipe.commit is None


def test_the_recipe_has_the_tag_of_each_object(url, tmp_path):
    perturb_checkpoint(url, tmp_path / "out")
    files = json.loads((tmp_path / "out/surgery.json").read_text())["files"]
    paths = [f"/{url.removeprefix('memory://')}/{file['source']}" for file in files]
    assert [file["source_version"] for file in files] == [
        f"created {MEMORY.info(path)['created'].timestamp()}" for path in paths
    ]


def test_a_file_url_is_its_path(sharded, tmp_path):
    recipe = perturb_checkpoint(f"file://{sharded}", f"file://{tmp_path}/out")
    assert recipe.source == str(sharded)
    assert (tmp_path / "out/surgery.json").is_file()
    assert "source_version" not in (tmp_path / "out/surgery.json").read_text()


def test_inspect_says_what_it_says_of_a_disk(sharded, url):
    here, there = (report.rows(inspect_checkpoint(place, stats=True)) for place in (sharded, url))
    assert there.pop("source") == url
    assert here.pop("source") == str(sharded)
    assert here == there


def test_inspect_reads_headers_alone(url, monkeypatch):
    found = reads(monkeypatch)
    inspect_checkpoint(url)
    weights = [(name, start) for name, start, _ in found if name.endswith(".safetensors")]
    assert sorted(weights) == [(f"model-0000{number}-of-00003.safetensors", 0) for number in (1, 2, 3)]
    assert {name for name, _, _ in found} >= {"config.json", "model.safetensors.index.json"}
    assert "README.md" not in {name for name, _, _ in found}


def test_a_long_header_takes_two_reads(tmp_path, monkeypatch):
    names = tuple(f"layer.{number}.with.a.long.name.weight" for number in range(1200))
    write_weights(tmp_path / "m/model.safetensors", names=names)
    url = upload(tmp_path / "m", tmp_path.name)
    found = reads(monkeypatch)
    assert len(inspect_checkpoint(url).tensors) == 1200
    assert [start for name, start, _ in found if name == "model.safetensors"] == [0, 100_000]


def test_diff_of_a_disk_and_a_store(sharded, url, tmp_path):
    perturb_checkpoint(sharded, tmp_path / "noisy")
    there = upload(tmp_path / "noisy", f"{tmp_path.name}/noisy")
    assert diff_checkpoints(sharded, url).tensors[0].kind == "equal"
    comparison = diff_checkpoints(sharded, there)
    assert comparison.tensors == diff_checkpoints(sharded, tmp_path / "noisy").tensors
    assert comparison.agreement
    assert not comparison.agreement.disagreeing


def test_a_single_file_is_known_by_the_config_beside_it(tmp_path):
    write_weights(tmp_path / "m/weights.safetensors")
    write_json(tmp_path / "m/config.json", {"model_type": "bert"})
    MEMORY.pipe_file(f"/{tmp_path.name}/another.safetensors", b"another")
    url = f"{upload(tmp_path / 'm', tmp_path.name)}/weights.safetensors"
    here, there = (
        perturb_checkpoint(tmp_path / "m/weights.safetensors", tmp_path / "a"),
        perturb_checkpoint(url, tmp_path / "b"),
    )
    assert there.source == url
    assert here.tensors == there.tensors
    assert (tmp_path / "a/weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()


def test_small_reads_beside_each_other_are_one(url, monkeypatch):
    checkpoint = resolve(url)
    name = checkpoint.layout.weights[0].files[0]
    file = open_weights(checkpoint, name)
    found = reads(monkeypatch)
    whole = np.frombuffer(MEMORY.cat_file(f"/{url.removeprefix('memory://')}/{name}"), np.uint8)
    found.clear()
    for tensor in file.header.tensors:
        for start in range(0, tensor.nbytes, 4):
            buffer = bytearray(4)
            file.read_into(tensor, start, memoryview(buffer))
            assert bytes(buffer) == whole[tensor.begin + start :][:4].tobytes()
    assert len(found) == 1


def test_digests_are_those_of_the_bytes(sharded, url):
    expected = digests_of_sources(resolve(sharded), dict.fromkeys(resolve(url).layout.weights[0].files, "blake3:"))
    assert digests_of_sources(resolve(url), expected) == expected


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused(tmp_path, suffix):
    MEMORY.pipe_file(f"/{tmp_path.name}/pytorch_model{suffix}", b"pickle")
    for url in (f"memory://{tmp_path.name}", f"memory://{tmp_path.name}/pytorch_model{suffix}"):
        with pytest.raises(SourceError) as refused:
            perturb_checkpoint(url, tmp_path / "out")
        assert str(refused.value) == (
            f"memory://{tmp_path.name}/pytorch_model{suffix}: expected safetensors, which can be read by ranges, got "
            "PyTorch's own format. Copy it to a disk first."
        )


@pytest.mark.parametrize("name", ["../escaped.json", "a\\b.json"])
def test_names_that_lead_out_are_refused(url, name, monkeypatch):
    info = {"name": f"/{url.removeprefix('memory://')}/{name}", "size": 1, "type": "file"}
    found = MEMORY.find(f"/{url.removeprefix('memory://')}", detail=True)
    monkeypatch.setattr(MEMORY, "find", lambda *_, **__: found | {info["name"]: info})
    with pytest.raises(SourceError, match="expected files of its own, got"):
        resolve(url)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1234567", "expected a safetensors header within its 7 bytes, got one of"),
        (b"<html>" * 10, "expected a safetensors header within its 60 bytes"),
        (raw_safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"1234"), "bytes, as its header"),
        (raw_safetensors(b'{"a":1}'), "expected a JSON header of tensors, got a malformed one"),
    ],
    ids=["short", "another", "cut", "malformed"],
)
def test_a_malformed_file_is_named_by_its_url(tmp_path, data, message):
    MEMORY.pipe_file(f"/{tmp_path.name}/model.safetensors", data)
    with pytest.raises(SourceError, match=message) as refused:
        inspect_checkpoint(f"memory://{tmp_path.name}")
    assert str(refused.value).startswith(f"memory://{tmp_path.name}/model.safetensors: ")


def test_a_missing_shard_is_named_by_the_url_of_its_index(url):
    place = url.removeprefix("memory://")
    MEMORY.rm_file(f"/{place}/model-00002-of-00003.safetensors")
    with pytest.raises(SourceError) as refused:
        resolve(url)
    assert str(refused.value) == (
        f"{url}/model.safetensors.index.json: expected shard model-00002-of-00003.safetensors, got no such file. "
        "Fetch the missing shard."
    )


def test_nothing_there_is_one_line(tmp_path):
    with pytest.raises(SourceError) as refused:
        resolve(f"memory://{tmp_path.name}/nothing")
    assert str(refused.value) == (
        f"memory://{tmp_path.name}/nothing: expected a folder or a file on the store, got nothing there. Check the URL."
    )


def test_a_revision_is_refused(url):
    with pytest.raises(SettingError, match="`revision`: expected a Hub id with it, got memory://"):
        resolve(url, revision="main")


def test_a_key_is_refused(url):
    with pytest.raises(SettingError, match="`key`: expected PyTorch files with it"):
        resolve(url, key="ema")


def test_dequantize_is_refused(url, tmp_path):
    with pytest.raises(SettingError) as refused:
        perturb_checkpoint(url, tmp_path / "out", dequantize="bf16")
    assert str(refused.value) == (f"`dequantize`: expected a folder or a file with it, got {url}. Copy it to a disk.")


def test_an_unfinished_folder_is_refused(url):
    MEMORY.pipe_file(f"/{url.removeprefix('memory://')}/surgery.unfinished.json", b"{}")
    with pytest.raises(SourceError, match="expected a finished checkpoint, got one that `surgery perturb` did not"):
        resolve(url)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json"])
@pytest.mark.parametrize("change", ["written", "removed"])
def test_what_changes_meanwhile_is_refused(url, tmp_path, monkeypatch, name, change):
    from surgery.perturb import execute as module

    path = f"/{url.removeprefix('memory://')}/{name}"
    with_ties = module.with_ties

    def changing(plan):
        data = MEMORY.cat_file(path)
        MEMORY.rm_file(path)
        if change == "written":
            MEMORY.pipe_file(path, data)
        return with_ties(plan)

    monkeypatch.setattr(module, "with_ties", changing)
    found = (
        "one that changed while it was read" if change == "written" else "one that was removed meanwhile|no such object"
    )
    with pytest.raises(SourceError, match=found):
        perturb_checkpoint(url, tmp_path / "out")
    assert not (tmp_path / "out/surgery.json").exists()


def test_the_hub_as_a_store(sharded, tmp_path, run_cli):
    with Hub() as hub:
        hub.add("org/name", {path.name: path.read_bytes() for path in sharded.iterdir() if path.is_file()})
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        assert run_cli("perturb", "hf://org/name@main", "-o", "out", env=env).code == 0
    perturb_checkpoint(sharded, tmp_path / "expected")
    for shard in sharded.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == (tmp_path / "expected" / shard.name).read_bytes()
    files = json.loads((tmp_path / "out/surgery.json").read_text())["files"]
    assert all(file["source_version"].startswith("blob_id ") for file in files)


def test_the_folder_of_small_files_goes_with_the_checkpoint(url):
    checkpoint = resolve(url)
    folder = checkpoint.path("config.json").parent
    assert folder.is_dir()
    del checkpoint
    assert not folder.exists()


def test_weights_are_never_copied(url):
    checkpoint = resolve(url)
    assert not checkpoint.path("model-00001-of-00003.safetensors").exists()
