"""verify, field by field of surgery.json: what it can compute again it compares, and what it cannot is named here."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_json
from safetensors.numpy import save_file

from surgery import SurgeryError, perturb_checkpoint, verify_checkpoint
from surgery.push.contents import read_contents

RECIPE = "surgery.json"
NOT_RECOMPUTED = {
    "card": "README.md is its owner's to edit",
    "left_out": "what lay beside the weights then",
    "notes": "what was so then, such as links",
    "known": "how that version knew it; another may know better, and leaves alone what the recipe does",
}
"""Fields by their last name, but for positions in lists."""


def write_source(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    weight_map = {}
    for number in (1, 2):
        drawn = {f"layer.{number}.weight": rng.standard_normal((40, 50), dtype=np.float32)}
        drawn[f"layer.{number}.half"] = rng.standard_normal((30, 9)).astype(np.float16)
        drawn[f"layer.{number}.norm"] = np.ones(7, np.float32)
        drawn[f"layer.{number}.ids"] = np.arange(5)
        if number == 2:
            drawn["head.weight"] = np.array(drawn["layer.2.weight"])
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file(drawn, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(drawn, shard)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", {"model_type": "bert"})
    (folder / "optimizer.pt").write_bytes(b"left out")
    (folder / "README.md").write_text("# source\n")


def leaves(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a document that holds nothing else."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for key, part in inside for leaf in leaves(part, *path, key)]
    yield from found or [path]


def changed(value: Any, name: Any) -> Any:
    """Return another value of the kind that a field has."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str) and ":" in value and len(value.rpartition(":")[2]) == 64:
        return value[:-1] + ("0" if value[-1] != "0" else "1")
    if isinstance(value, str) and len(value) == 64:
        return value[:-1] + ("0" if value[-1] != "0" else "1")
    if isinstance(value, str) and value.startswith("0x"):
        return (float.fromhex(value) * (1 + 2**-52) or 0.5).hex()
    if value is None:
        return {"std": "0x1p-3", "pooled_std": "0x1p-3"}.get(name, "other")
    return {"uniform": "normal", "matrix": "global", "nearest": "stochastic"}.get(value, f"{value}x")


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(document)
    inside = document
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return document


def is_noticed(folder: Path) -> bool:
    try:
        return not verify_checkpoint(folder, workers=1).is_equal
    except SurgeryError:
        return True


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_every_field_is_compared_or_named(scale: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out", scale=scale, include=["layer.**", "head.*"])
    pushed = read_contents(tmp_path / "out", recipe_only=False).recipe
    document = json.loads((tmp_path / "out" / RECIPE).read_text()) | {"sha256": pushed.sha256}
    assert document["sha256"]
    write_json(tmp_path / "out" / RECIPE, document)
    assert not is_noticed(tmp_path / "out")
    unnoticed, seen = set(), set()
    for path in leaves(document):
        value = document
        for key in path:
            value = value[key]
        name = next(key for key in reversed(path) if not isinstance(key, int))
        field = next((key for key in path if key in NOT_RECOMPUTED), name)
        if isinstance(value, dict | list):
            other = [*value, "other"] if isinstance(value, list) else {"other": "other"}
        else:
            other = changed(value, name)
        write_json(tmp_path / "out" / RECIPE, put(document, path, other))
        (unnoticed if not is_noticed(tmp_path / "out") else seen).add((field, path))
    wrong = sorted(str(path) for field, path in unnoticed if field not in NOT_RECOMPUTED)
    assert not wrong, wrong
    assert {field for field, _ in unnoticed} == NOT_RECOMPUTED.keys()


@pytest.mark.parametrize("where", [(), ("source",), ("settings",), ("files", 0), ("files", 0, "tensors", 0)])
def test_field_that_is_gone_or_not_known_is_noticed(where: tuple[Any, ...], tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    document = json.loads((tmp_path / "out" / RECIPE).read_text())
    inside = document
    for key in where:
        inside = inside[key]
    optional = {"card", "notes", "key", "known", "std"}
    for field in inside.keys() - optional:
        less = copy.deepcopy(document)
        part = less
        for key in where:
            part = part[key]
        del part[field]
        write_json(tmp_path / "out" / RECIPE, less)
        assert is_noticed(tmp_path / "out"), field
