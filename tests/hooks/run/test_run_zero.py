"""A run reaches the gradient under DeepSpeed's ZeRO: two ranks have the parameters of a loop by hand, in float64."""

from functools import partial
from pathlib import Path
from typing import Any

import byhand
import pytest
import seeded
import torch
from running import TORCHRUN, Run, run
from safetensors.torch import load_file

from surgery import perturb_model

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make test-deepspeed")

HEAD, EPS = ("dropout", "classifier"), 1e-3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained BERT without a head."""
    return seeded.bert_folder(tmp_path_factory.mktemp("source"))


def by_hand(source: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What five steps by hand make of it, each on both ranks' rows."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=dtype)
    draw_head(model)
    perturb_model(model, lam=byhand.LAM, seed=0)
    batch = seeded.batch(20)
    parts = list(zip(batch["input_ids"].split(2), batch["labels"].split(2), strict=True))
    steps: Any = [[(100 + n, *parts[2 * n]), (1100 + n, *parts[2 * n + 1])] for n in range(5)]
    adamw: Any = partial(torch.optim.AdamW, weight_decay=0.0, eps=EPS)
    mixed = byhand.Mixed(model, fresh=HEAD, kept=HEAD)
    return byhand.train(model, steps, lambda ids: model(input_ids=ids).logits, mixed=mixed, optimizer=adamw, lr=1e-3)


def draw_head(model: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        model.classifier.weight.copy_(0.02 * torch.randn(2, 32))
        model.classifier.bias.zero_()


@pytest.fixture(scope="module")
def wanted(source: Path) -> dict[str, torch.Tensor]:
    return by_hand(source, torch.float64)


def trained(folder: Path, way: str, stage: int, source: Path, *resume: object) -> Run:
    args = (way, stage, source, folder / "out", *resume)
    ran = run(folder, "with_deepspeed.py", *byhand.ALL, args=args, launcher=TORCHRUN)
    assert ran.code == 0, ran.err
    return ran


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What was saved, by its names: of a model that zero.Init has loaded, transformers writes those of long ago."""
    found = load_file(folder / "out" / "final" / "model.safetensors")
    for old, new in {"gamma": "weight", "beta": "bias"}.items():
        found = {name.replace(f"LayerNorm.{old}", f"LayerNorm.{new}"): w for name, w in found.items()}
    return found


WAYS = [("loop", 1), ("accelerate", 1), ("accelerate", 2), ("loop", 2), ("accelerate", 3), ("loop", 3)]


@pytest.mark.parametrize(("way", "stage"), WAYS)
def test_ways(way: str, stage: int, source: Path, wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ran = trained(tmp_path, way, stage, source)
    byhand.assert_equal(weights(tmp_path), wanted)
    assert_all_acted(ran)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trainer_and_resume(stage: int, source: Path, wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ran = trained(tmp_path, "trainer", stage, source)
    byhand.assert_equal(weights(tmp_path), wanted)
    assert_all_acted(ran)
    (tmp_path / "out" / "final").rename(tmp_path / "first")
    again = trained(tmp_path, "trainer", stage, source, "--resume", tmp_path / "out" / "checkpoint-3")
    byhand.assert_equal(weights(tmp_path), wanted)
    assert [entry["steps"] for entry in again.models] == [2, 2]


def test_weights_that_are_split_while_they_are_loaded(source: Path, tmp_path: Path) -> None:
    ran = trained(tmp_path, "init", 3, source)
    byhand.assert_equal(weights(tmp_path), by_hand(source, torch.float32), tolerance=1e-6)
    assert_all_acted(ran)


def assert_all_acted(ran: Run) -> None:
    for rank in ran.ranks:
        (entry,) = rank["models"]
        assert (entry["class"], entry["new"]) == (
            "BertForSequenceClassification",
            ["classifier.bias", "classifier.weight"],
        )
        assert (entry["perturbed"], entry["mixed"], entry["steps"], entry["rdrop_fired"]) == (16, 13, 5, 5)
    trained = [record for record in ran.records if record.get("models")]
    assert [record["acts"] for record in trained] == [["anchor", "mixout", "noisytune", "rdrop"]] * 2
