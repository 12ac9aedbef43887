"""`--recipe-only`: all of a run but the weights, which `materialize` makes again from it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import tree_digest, write_sharded
from commands import Ran

from surgery import OutputError, materialize_checkpoint, perturb_checkpoint, verify_checkpoint

WEIGHTS = {"model.safetensors", "model.safetensors.index.json"}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["one file", "shards"])
def checkpoint(request: pytest.FixtureRequest, source: Path) -> Path:
    if request.param == "shards":
        (source / "model.safetensors").unlink()
        write_sharded(source)
    return source


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_it_is_the_rest_of_a_run_and_makes_the_weights_again(checkpoint: Path, tmp_path: Path, scale: str) -> None:
    full = perturb_checkpoint(checkpoint, tmp_path / "full", seed=3, scale=scale)
    assert perturb_checkpoint(checkpoint, tmp_path / "recipe", seed=3, scale=scale, recipe_only=True) == full
    left = names(tmp_path / "recipe")
    assert not any("safetensors" in name for name in left)
    assert left == {name for name in names(tmp_path / "full") if "safetensors" not in name}
    for name in left:
        assert (tmp_path / "recipe" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()
    materialize_checkpoint(tmp_path / "recipe", tmp_path / "again")
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "full")


def test_it_is_resumed_and_found_finished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "model.safetensors").unlink()
    write_sharded(source)
    from surgery.perturb import here

    real, done = here._finish, []

    def finish_or_die(*args: object) -> None:
        real(*args)
        done.append(args[0].name)
        if len(done) == 1:
            raise OSError(5, os.strerror(5))

    monkeypatch.setattr(here, "_finish", finish_or_die)
    with pytest.raises(OutputError, match="Input/output error"):
        perturb_checkpoint(source, tmp_path / "out", recipe_only=True, workers=1)
    assert names(tmp_path / "out") == {"surgery.unfinished.json"}
    with pytest.raises(
        OutputError, match=r"another command did not finish\. Finish it with `surgery perturb .* --recipe-only`"
    ):
        perturb_checkpoint(source, tmp_path / "out")
    recipe = perturb_checkpoint(source, tmp_path / "out", recipe_only=True)
    assert len(done) == len(set(done)) == len(recipe.files)
    assert recipe == perturb_checkpoint(source, tmp_path / "whole", recipe_only=True)
    assert perturb_checkpoint(source, tmp_path / "out", recipe_only=True) == recipe
    assert len(done) == 2 * len(recipe.files)


def test_needs_no_room_for_weights(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    perturb_checkpoint(source, tmp_path / "out", recipe_only=True)
    with pytest.raises(OutputError, match="free on this disk"):
        perturb_checkpoint(source, tmp_path / "full")


def test_verify_says_what_is_missing(source: Path, tmp_path: Path) -> None:
    perturb_checkpoint(source, tmp_path / "out", recipe_only=True)
    assert verify_checkpoint(tmp_path / "out").faults == ("model.safetensors: expected a weight file, got none.",)


def test_command_prints_how_to_make_the_weights(source: Path, tmp_path: Path, run_cli: Callable[..., Ran]) -> None:
    done = run_cli("perturb", source, "-o", tmp_path / "out", "--recipe-only")
    assert "the recipe and its companions, without weights" in done.out
    assert f"next: surgery materialize {tmp_path / 'out'} -o {tmp_path / 'out'}-weights" in done.out
    planned = run_cli("perturb", source, "-o", tmp_path / "other", "--recipe-only", "--dry-run")
    assert f"-o {tmp_path / 'other'} --recipe-only" in planned.out
