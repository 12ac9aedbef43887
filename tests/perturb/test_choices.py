"""Which tensors get noise, how the recipe says that was known, and that a recipe's own choices are repeated."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tree_digest, write_json
from commands import Ran
from safetensors.numpy import load_file, save_file

from surgery import Recipe, inspect_checkpoint, materialize_checkpoint, perturb_checkpoint, verify_checkpoint
from surgery.perturb import plan
from surgery.roles import BUFFER, Role

CODEBOOK = "quantizer.layers.0.codebook.embed"
NAMES = ("w.weight", "rope.freqs", "bn.running_mean", CODEBOOK, "conv.weight_orig", "conv.weight_u")


def write(folder: Path, names: tuple[str, ...] = NAMES, **config: str) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    save_file({name: rng.standard_normal((8, 4)).astype(np.float32) for name in names}, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    return folder


def changed(source: Path, out: Path) -> set[str]:
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_recipe_says_how_each_tensor_was_known(tmp_path: Path) -> None:
    source = write(tmp_path / "source", model_type="encodec")
    recipe = perturb_checkpoint(source, tmp_path / "out")
    assert {tensor.name: (tensor.copied, tensor.known) for tensor in recipe.tensors} == {
        "w.weight": (None, "class"),
        "rope.freqs": (f"{BUFFER}: a table of rotary frequencies", "rule"),
        "bn.running_mean": (BUFFER, "name"),
        CODEBOOK: (BUFFER, "class"),
        "conv.weight_orig": (None, "class"),
        "conv.weight_u": (f"{BUFFER}: a vector of spectral_norm", "rule"),
    }
    assert changed(source, tmp_path / "out") == {"w.weight", "conv.weight_orig"}
    assert Recipe.read(tmp_path / "out/surgery.json") == recipe


def test_without_a_class_names_decide(tmp_path: Path) -> None:
    for folder, config in {"none": {}, "unheard-of": {"model_type": "unheard-of"}}.items():
        source = write(tmp_path / folder, **config)
        recipe = perturb_checkpoint(source, tmp_path / f"{folder}-out")
        assert {t.known for t in recipe.tensors} == {"rule", "name"}
        assert {t.name for t in recipe.tensors if not t.copied} == {"w.weight", CODEBOOK, "conv.weight_orig"}


@pytest.mark.parametrize("text", ["[]", '{"model_type": ["bert"]}', '{"model_type": {}}'])
def test_a_damaged_config_names_no_class(text: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    weights = tmp_path / "alone"
    weights.mkdir()
    (source / "model.safetensors").rename(weights / "x.safetensors")
    (weights / "config.json").write_text(text)
    assert {info.known for info in inspect_checkpoint(weights / "x.safetensors").tensors} == {"rule", "name"}


def test_a_sibling_may_be_in_another_shard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shards = {
        "conv.weight_orig": "model-00001-of-00002.safetensors",
        "conv.weight_u": "model-00002-of-00002.safetensors",
    }
    for name, shard in shards.items():
        save_file({name: rng.standard_normal((8, 4)).astype(np.float32)}, tmp_path / shard)
    write_json(tmp_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": shards})
    recipe = perturb_checkpoint(tmp_path, tmp_path.parent / "out-of-shards")
    assert {tensor.name for tensor in recipe.tensors if tensor.copied} == {"conv.weight_u"}


def test_include_that_names_a_buffer_overrules(tmp_path: Path) -> None:
    source = write(tmp_path / "source", model_type="encodec")
    recipe = perturb_checkpoint(source, tmp_path / "out", include=["w.weight", "rope.freqs", CODEBOOK])
    assert changed(source, tmp_path / "out") == {"w.weight", "rope.freqs", CODEBOOK}
    assert {t.name: t.known for t in recipe.tensors if not t.copied} == {
        "w.weight": "class",
        "rope.freqs": "rule",
        CODEBOOK: "class",
    }
    assert verify_checkpoint(tmp_path / "out").is_equal
    perturb_checkpoint(source, tmp_path / "all", include="**")
    assert changed(source, tmp_path / "all") == {"w.weight", "conv.weight_orig"}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source, and what a version that knew less of buffers made of it and recorded."""
    source = write(tmp_path / "source", model_type="encodec")
    with monkeypatch.context() as patch:
        patch.setattr(plan, "find_roles", lambda shapes, _kind: {n: Role("running" in n, None) for n in shapes})
        perturb_checkpoint(source, tmp_path / "old")
    assert "known" not in (tmp_path / "old/surgery.json").read_text()
    return source, tmp_path / "old"


def test_an_old_recipe_is_verified_by_its_own_choices(old: tuple[Path, Path]) -> None:
    source, out = old
    assert "rope.freqs" in changed(source, out)
    found = verify_checkpoint(out)
    assert (found.is_equal, found.differences, found.faults) == (True, (), ())


def test_an_old_recipe_materializes_to_the_same_bytes(old: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = old
    materialize_checkpoint(out, tmp_path / "again")
    assert tree_digest(tmp_path / "again") == tree_digest(out)


def test_a_recorded_buffer_stays_one_though_an_include_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr("surgery.noisytune.NoisyTune.overrule", lambda _self, _name, role: role)
        perturb_checkpoint(source, tmp_path / "out", include=["w.weight", "bn.running_mean"])
    assert changed(source, tmp_path / "out") == {"w.weight"}
    assert verify_checkpoint(tmp_path / "out").is_equal


def test_the_same_command_does_not_take_an_old_result_for_its_own(
    old: tuple[Path, Path], run_cli: Callable[..., Ran]
) -> None:
    source, out = old
    ran = run_cli("perturb", source, "-o", out)
    assert ran.code == 1
    assert "expected a new or empty folder" in ran.err


def test_inspect_shows_how_each_tensor_is_known(tmp_path: Path, run_cli: Callable[..., Ran]) -> None:
    source = write(tmp_path / "source", model_type="encodec")
    ran = run_cli("inspect", source)
    assert "known by     class 3, rule 2, name 1" in ran.out
    rows = json.loads(run_cli("inspect", source, "--json").out)["tensors"]
    assert {row["name"]: row["known"] for row in rows}["rope.freqs"] == "rule"
    planned = json.loads(run_cli("perturb", source, "--dry-run", "--json").out)["tensors"]
    assert {row["name"]: row["known"] for row in planned} == {row["name"]: row["known"] for row in rows}
