"""`--seed A..B`: several variants by one command, each the one that its seed alone gives."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import tree_digest
from commands import Ran

from surgery import Recipe, perturb_checkpoint


@pytest.fixture
def surgery(run_cli: Callable[..., Ran]) -> Callable[..., Ran]:
    return run_cli


def test_each_is_what_its_seed_gives(source: Path, tmp_path: Path, surgery: Callable[..., Ran]) -> None:
    done = surgery("perturb", source, "-o", tmp_path / "out-{seed}", "--seed", "2..4")
    assert done.code == 0, done.err
    for seed in (2, 3, 4):
        assert f"perturbed into {tmp_path / f'out-{seed}'}" in done.out
        perturb_checkpoint(source, tmp_path / "alone" / str(seed), seed=seed)
        assert tree_digest(tmp_path / f"out-{seed}") == tree_digest(tmp_path / "alone" / str(seed))
        assert f"noise, lam 0.15, seed {seed}\n" in (tmp_path / f"out-{seed}" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == [
        "out-2",
        "out-3",
        "out-4",
    ]


def test_rows_are_those_of_each(source: Path, tmp_path: Path, surgery: Callable[..., Ran]) -> None:
    done = surgery("perturb", source, "-o", tmp_path / "out-{seed}", "--seed", "0..1", "--json")
    assert [(row["seed"], row["out"]) for row in json.loads(done.out)["variants"]] == [
        (seed, str(tmp_path / f"out-{seed}")) for seed in (0, 1)
    ]
    alone = json.loads(surgery("perturb", source, "-o", tmp_path / "out-{seed}", "--seed", "5", "--json").out)
    assert (alone["seed"], alone["out"]) == (5, str(tmp_path / "out-5"))
    assert Recipe.read(tmp_path / "out-5" / "surgery.json").settings.seed == 5


def test_default_folders_have_a_seed_each(source: Path, tmp_path: Path, surgery: Callable[..., Ran]) -> None:
    assert surgery("perturb", source, "--seed", "0..1").code == 0
    assert {path.name for path in tmp_path.glob("source-*")} == {f"source-noisytune-lam0.15-seed{n}" for n in (0, 1)}


@pytest.mark.parametrize(
    "args",
    [("-o", "out"), ("--plot", "map.png"), ("-o", "out-{seed}", "--push", "me/noisy")],
    ids=["out", "plot", "push"],
)
def test_one_place_for_several_is_refused(
    source: Path, tmp_path: Path, surgery: Callable[..., Ran], args: tuple[str, ...]
) -> None:
    before = tree_digest(tmp_path, skip="hf-home")
    done = surgery("perturb", source, "--seed", "0..1", *args)
    assert done.code == 1
    assert f"expected {{seed}} in it with several seeds, got {args[-1]}. Write " in done.err
    assert tree_digest(tmp_path, skip="hf-home") == before


@pytest.mark.parametrize("seed", ["a", "1..", "3..1", "0..99999999999", "1,2", "", "0..9..", "9" * 5000])
def test_what_is_no_range_is_a_usage_error(source: Path, surgery: Callable[..., Ran], seed: str) -> None:
    done = surgery("perturb", source, "--seed", seed)
    assert done.code == 2
    assert "expected a seed, or a range such as 0..9" in done.err
