"""`surgery run` reaches the gradient: after 5 steps, each way of training has the parameters of a loop by hand."""

from pathlib import Path
from typing import Any

import byhand
import pytest
import seeded
import torch
from running import run
from scripts import plain
from torch import nn
from transformers import AutoModelForSequenceClassification

from surgery import perturb_model

HEAD = ["dropout", "classifier"]


def classifier(source: Path) -> Any:
    """A pretrained BERT with noise, and a new head without."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float64)
    perturb_model(model, lam=byhand.LAM, seed=0)
    return model


def rows(count: int = 20, size: int = 4) -> list[byhand.Batch]:
    batch = seeded.batch(count)
    return list(zip(batch["input_ids"].split(size), batch["labels"].split(size), strict=True))


def train_classifier(model: nn.Module, batches: list[byhand.Batch], **settings: Any) -> dict[str, torch.Tensor]:
    mixed = byhand.Mixed(model, fresh=HEAD, kept=HEAD)
    settings = {"lr": 1e-3, "optimizer": lambda w, lr: torch.optim.AdamW(w, lr=lr, weight_decay=0.0)} | settings
    return byhand.train(model, batches, lambda ids: model(input_ids=ids).logits, mixed=mixed, **settings)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded.bert_folder(tmp_path_factory.mktemp("source"))


def test_trainer(source: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, "with_trainer.py", *byhand.ALL, args=(source, tmp_path / "out"))
    assert ran.code == 0, ran.err
    got = torch.load(tmp_path / "out" / "final.pt")
    byhand.assert_equal(got, train_classifier(classifier(source), rows()))
    (entry,) = ran.models
    assert (entry["class"], entry["new"]) == ("BertForSequenceClassification", ["classifier.bias", "classifier.weight"])
    assert (entry["mixed"], entry["steps"], entry["rdrop_fired"]) == (13, 5, 5)

    resumed = run(
        tmp_path,
        "with_trainer.py",
        *byhand.ALL,
        args=(source, tmp_path / "again", "--resume", tmp_path / "out" / "checkpoint-3"),
    )
    assert resumed.code == 0, resumed.err
    byhand.assert_equal(torch.load(tmp_path / "again" / "final.pt"), got, tolerance=0)
    assert resumed.models[0]["distance"] == entry["distance"]


def net(*, has_loss: bool = False) -> plain.Net:
    torch.manual_seed(0)
    model = plain.Net(has_loss).double()
    perturb_model(model, lam=byhand.LAM, seed=0)
    return model


def numbers(count: int = 5) -> list[byhand.Batch]:
    generator = torch.Generator().manual_seed(0)

    def one() -> byhand.Batch:
        x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (4,), generator=generator)

    return [one() for _ in range(count)]


WAYS = "outside", "inside", "accumulated", "parts"
COMPILED = "compiled first", "compiled after", "compiled in place", "compiled step"


@pytest.mark.parametrize("ways", [WAYS, COMPILED], ids=["plain", "compiled"])
def test_plain_loop(ways: tuple[str, ...], tmp_path: Path) -> None:
    ran = run(tmp_path, "plain.py", *byhand.ALL, args=(tmp_path / "final.pt", *ways))
    assert ran.code == 0, ran.err
    found = torch.load(tmp_path / "final.pt")
    for way in ways:
        model = net()
        batches, accumulate = (numbers(6), 2) if way == "accumulated" else (numbers(), 1)
        mixed = byhand.Mixed(model)
        wanted = byhand.train(model, batches, model, mixed=mixed, lr=0.1, accumulate=accumulate)
        print(way)
        byhand.assert_equal(found[way], wanted)
