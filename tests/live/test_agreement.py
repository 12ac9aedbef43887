"""For every model type of transformers: `surgery perturb` and perturb_model give noise to the same tensors."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from surgery.checkpoint.pickles import DTYPES
from surgery.live.names import find_names
from surgery.live.parts import NEW
from surgery.noisytune import FLOATS, NoisyTune
from surgery.perturb.plan import make_plan


def as_saved(model: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 saves weights as they are
        return state_dict
    with zoo.quiet():
        return revert_weight_conversion(model, state_dict)


def write_headers(model: Any, folder: Path) -> None:
    """Write what save_pretrained would, with holes for weights: choices take headers only, and the models are large."""
    seen: set[int] = set()
    state_dict = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # tied weights are written once
            state_dict[name] = tensor
        seen.add(id(tensor))
    state_dict = as_saved(model, state_dict)
    entries, end = {}, 0
    for name, tensor in state_dict.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "model_type": model.config.model_type}
    (folder / "config.json").write_text(json.dumps(config, default=str))


def disagreements(model: Any, folder: Path) -> list[str]:
    """Name the tensors that one side would perturb and the other not, and those where both are wrong."""
    write_headers(model, folder)
    plan = make_plan(folder, folder.parent / "out", NoisyTune())
    (shard,) = plan.shards
    with zoo.quiet():
        names = find_names(model, folder)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = []
    for name, written in names.canonical.items():
        tensor = names.tensors[name]
        dtype = DTYPES.get(tensor.dtype, "")
        if names.copied.get(name) == NEW or name in names.converted or dtype not in FLOATS or tensor.numel() < 2:
            continue
        on_file, live = written not in shard.copied, not names.roles[name].is_buffer
        if not on_file == live == (name in parameters):
            found.append(f"{name}: file {on_file}, model {live}, parameter {name in parameters}")
    return found


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", zoo.model_types())
def test_file_and_model_agree_on_every_model_type(model_type: str, tmp_path: Path) -> None:
    classes = zoo.classes_of(model_type)
    built = 0
    for class_name in dict.fromkeys([*classes[:1], *classes[-1:]]):
        try:
            model = zoo.build_one(model_type, class_name)
        except Exception:
            continue
        built += 1
        assert disagreements(model, tmp_path / class_name) == []
    if not built:
        pytest.skip("no class of its own" if not classes else "cannot be built here")


@pytest.mark.parametrize("model_type", ["bert", "encodec", "minimax", "ibert", "speecht5"])
def test_file_and_model_agree(model_type: str, tmp_path: Path) -> None:
    for class_name in zoo.classes_of(model_type)[:1]:
        assert disagreements(zoo.build_one(model_type, class_name), tmp_path / class_name) == []


def test_disagreement_is_found(tmp_path: Path) -> None:
    model = zoo.build_one("bert", "BertModel")
    model.encoder.register_buffer("unheard_of", torch.empty(3, device="meta"))
    assert disagreements(model, tmp_path / "x") == ["encoder.unheard_of: file True, model False, parameter False"]
