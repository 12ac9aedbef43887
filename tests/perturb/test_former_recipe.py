"""What versions wrote whose recipes are surgery-recipe-1 is read, verified, repeated, resumed and replaced."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tree_digest, write_json, write_sharded
from former import make_former, make_former_journal, sha256
from safetensors.numpy import load_file, save_file

from surgery import OutputError, Recipe, SourceError, materialize_checkpoint, perturb_checkpoint, verify_checkpoint
from surgery.inspect.diff import diff_checkpoints
from surgery.perturb.output import OutputFolder


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """What a former version made of `source`."""
    perturb_checkpoint(source, tmp_path / "out", seed=4)
    make_former(tmp_path / "out", source)
    return tmp_path / "out"


def test_former_recipe_is_read_with_its_algorithm(out: Path, source: Path) -> None:
    recipe = Recipe.read(out / "surgery.json")
    names = ("config.json", "model.safetensors", "tokenizer.json")
    assert recipe.digests == {name: f"sha256:{sha256(out / name)}" for name in names}
    assert recipe.source_digests == {"model.safetensors": f"sha256:{sha256(source / 'model.safetensors')}"}
    assert recipe.card == f"sha256:{sha256(out / 'README.md')}"
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_former_recipe_verifies(out: Path) -> None:
    assert verify_checkpoint(out).is_equal


def _flip(path: Path) -> None:
    w = load_file(path)
    w["out.weight"][0, 0] += 1
    save_file(w, path, {"format": "pt"})


_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "companion": (
        lambda out: (out / "config.json").write_text("{}"),
        r"config.json: expected the source's file \(sha256 [0-9a-f]{12}...\), got another \(sha256 44136fa355b3...\).",
    ),
    "recipe": (
        lambda out: write_json(out / "surgery.json", _with_zeros(out)),
        r"surgery.json: model.safetensors: digest: expected sha256:[0-9a-f]{64}, as source and settings give, "
        r"got sha256:0{64} in the recipe.",
    ),
}


def _with_zeros(out: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((out / "surgery.json").read_bytes())
    recipe["files"][0]["sha256"] = "0" * 64
    return recipe


@pytest.mark.parametrize(("spoil", "fault"), _FAULTS.values(), ids=_FAULTS)
def test_fault_names_the_recorded_algorithm(spoil: Callable[[Path], Any], fault: str, out: Path) -> None:
    spoil(out)
    (found,) = verify_checkpoint(out).faults
    assert re.fullmatch(fault, found)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_other_source_is_refused_with_the_recorded_algorithm(
    name: str, out: Path, source: Path, tmp_path: Path
) -> None:
    before = sha256(source / name)[:12]
    (source / name).write_bytes((source / name).read_bytes()[:-1] + b" ")
    message = f"source (sha256 {before}...), got another file (sha256 {sha256(source / name)[:12]}...)."
    for call in (verify_checkpoint, lambda out: materialize_checkpoint(out, tmp_path / "again")):
        with pytest.raises(SourceError, match=re.escape(message)):
            call(out)


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_former_recipe_is_repeated_to_the_same_bytes(scale: str, tmp_path: Path) -> None:
    """With the digests of the former recipe, which now say what they are."""
    write_sharded(tmp_path / "source")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out", scale=scale)
    make_former(tmp_path / "out", tmp_path / "source")
    recipe = materialize_checkpoint(tmp_path / "out", tmp_path / "again")
    assert recipe == Recipe.read(tmp_path / "out/surgery.json")
    found, expected = tree_digest(tmp_path / "again"), tree_digest(tmp_path / "out")
    assert {name for name in found | expected if found.get(name) != expected.get(name)} == {"surgery.json"}
    assert json.loads((tmp_path / "again/surgery.json").read_bytes())["format"] == "surgery-recipe-2"
    assert materialize_checkpoint(tmp_path / "out", tmp_path / "again") == recipe
    assert tree_digest(tmp_path / "again") == found


def test_same_run_again_writes_nothing(out: Path, source: Path) -> None:
    before = tree_digest(out)
    recipe = perturb_checkpoint(source, out, seed=4)
    assert (recipe, tree_digest(out)) == (Recipe.read(out / "surgery.json"), before)


def test_former_run_is_replaced_unless_its_card_is_edited(out: Path, source: Path) -> None:
    perturb_checkpoint(source, out, seed=5, overwrite=True)
    make_former(out, source)
    (out / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"README.md: expected the card that was written here, got one edited since"):
        perturb_checkpoint(source, out, seed=6, overwrite=True)


def test_diff_compares_with_a_former_recipe(out: Path, source: Path) -> None:
    agreement = diff_checkpoints(source, out).agreement
    assert agreement
    assert not agreement.disagreeing


@pytest.mark.parametrize("digits", ["0" * 63, "blake3:" + "0" * 64, "g" * 64, 7, None])
@pytest.mark.parametrize("key", ["sha256", "source_sha256"])
def test_damaged_digest_makes_it_no_recipe(key: str, digits: object, out: Path) -> None:
    recipe = json.loads((out / "surgery.json").read_bytes())
    recipe["files"][0][key] = digits
    with pytest.raises(SourceError, match=r"^surgery.json: expected a recipe, got another or a damaged file."):
        Recipe.from_json(json.dumps(recipe))


# -- a run that a former version did not finish -----------------------------------------------------------------------


def _leave_unfinished(**settings: Any) -> None:
    """Perturb, and be interrupted when nothing but the recipe is left to write."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            perturb_checkpoint(**settings)


@pytest.fixture(params=["matrix", "global"])
def unfinished(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run: `out` it has not finished, `whole` it has; both of them of the sharded `source`."""
    settings = {"source": tmp_path / "source", "scale": request.param}
    write_sharded(tmp_path / "source")
    perturb_checkpoint(out=tmp_path / "whole", **settings)
    _leave_unfinished(out=tmp_path / "out", **settings)
    return settings


def test_former_journal_is_resumed(unfinished: dict[str, Any], tmp_path: Path) -> None:
    """What it says was finished is done again: its figures are no digests of this version."""
    make_former_journal(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    perturb_checkpoint(out=tmp_path / "out", **unfinished)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns != before[path] for path in shards)


def test_own_journal_is_resumed_without_doing_it_again(unfinished: dict[str, Any], tmp_path: Path) -> None:
    """The opposite: so the test above can fail."""
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    perturb_checkpoint(out=tmp_path / "out", **unfinished)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.usefixtures("unfinished")
def test_former_recipe_takes_no_digests_of_another_algorithm_from_a_journal(tmp_path: Path) -> None:
    """The run is the same, and its journal has BLAKE3."""
    make_former(tmp_path / "whole", tmp_path / "source")
    recipe = materialize_checkpoint(tmp_path / "whole", tmp_path / "out")
    assert recipe == Recipe.read(tmp_path / "whole/surgery.json")


@pytest.mark.parametrize("record", [None, [], "x", {}, {"size": 1304}], ids=["null", "list", "text", "empty", "size"])
def test_journal_with_a_record_that_is_none_is_resumed(record: object, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _leave_unfinished(source=source, out=out)
    journal = json.loads((out / "surgery.unfinished.json").read_bytes())
    journal["finished"] = {"model.safetensors": record}
    write_json(out / "surgery.unfinished.json", journal)
    perturb_checkpoint(source, out)
    assert verify_checkpoint(out).is_equal
