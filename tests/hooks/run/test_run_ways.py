"""A run reaches the gradient: after 5 steps, each way of training has the parameters of a loop by hand."""

from pathlib import Path
from typing import Any

import byhand
import pytest
import seeded
import torch
from running import SCRIPTS, TORCHRUN, run
from torch import nn

from surgery import perturb_model

HEAD = ("dropout", "classifier")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained BERT without a head."""
    return seeded.bert_folder(tmp_path_factory.mktemp("source"))


def classifier(source: Path) -> Any:
    """That BERT with noise, and a new head without."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float64)
    perturb_model(model, lam=byhand.LAM, seed=0)
    return model


def rows(size: int = 4) -> list[byhand.Batch]:
    batch = seeded.batch(20)
    return list(zip(batch["input_ids"].split(size), batch["labels"].split(size), strict=True))


def train_classifier(model: nn.Module, steps: list[byhand.Step], **settings: Any) -> dict[str, torch.Tensor]:
    return byhand.train(
        model, steps, lambda ids: model(input_ids=ids).logits, optimizer=byhand.adamw, lr=1e-3, **settings
    )


@pytest.mark.transformers
def test_trainer(source: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, "with_trainer.py", *byhand.ALL, args=(source, tmp_path / "out"))
    assert ran.code == 0, ran.err
    got = torch.load(tmp_path / "out" / "final.pt")
    model = classifier(source)
    mixed = byhand.Mixed(model, fresh=HEAD, kept=HEAD)
    byhand.assert_equal(got, train_classifier(model, byhand.seeded_steps(rows()), mixed=mixed))
    (entry,) = ran.models
    assert (entry["class"], entry["new"]) == ("BertForSequenceClassification", ["classifier.bias", "classifier.weight"])
    assert (entry["mixed"], entry["steps"], entry["rdrop_fired"]) == (13, 5, 5)

    checkpoint = tmp_path / "out" / "checkpoint-3"
    again = run(tmp_path, "with_trainer.py", *byhand.ALL, args=(source, tmp_path / "again", "--resume", checkpoint))
    assert again.code == 0, again.err
    byhand.assert_equal(torch.load(tmp_path / "again" / "final.pt"), got, tolerance=0)
    assert again.models[0]["distance"] == entry["distance"]


def test_accelerate_with_accumulation(source: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, "with_accelerate.py", *byhand.ALL, args=(source, tmp_path))
    assert ran.code == 0, ran.err
    got = torch.load(tmp_path / "final.pt")
    model = classifier(source)
    mixed = byhand.Mixed(model, fresh=HEAD, kept=HEAD)
    parts = rows(2)
    steps = [[(100 + n, *parts[2 * n]), (None, *parts[2 * n + 1])] for n in range(5)]
    byhand.assert_equal(got, train_classifier(model, steps, mixed=mixed))
    assert (ran.models[0]["steps"], ran.models[0]["rdrop_fired"]) == (5, 5)

    args = (source, tmp_path, "--resume", tmp_path / "checkpoint")
    again = run(tmp_path, "with_accelerate.py", *byhand.ALL, args=args)
    assert again.code == 0, again.err
    byhand.assert_equal(torch.load(tmp_path / "final.pt"), got, tolerance=0)
    assert again.models[0]["distance"] == ran.models[0]["distance"]


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the scripts' own network."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import nets

    return nets


def train_net(nets: Any, steps: list[byhand.Step]) -> dict[str, torch.Tensor]:
    model = nets.build()
    perturb_model(model, lam=byhand.LAM, seed=0)
    return byhand.train(model, steps, model, mixed=byhand.Mixed(model))


def train_net_with_lbfgs(nets: Any) -> dict[str, torch.Tensor]:
    model = nets.build()
    perturb_model(model, lam=byhand.LAM, seed=0)
    mixed = byhand.Mixed(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    for number, (x, labels) in enumerate(nets.batches()):

        def gradients(x: torch.Tensor = x, labels: torch.Tensor = labels) -> torch.Tensor:
            optimizer.zero_grad()
            loss = byhand.two_passes(model, x, labels)
            loss.backward()
            return loss

        torch.manual_seed(100 + number)
        mixed.anchor(0.1)
        optimizer.step(gradients)
    return model.state_dict()


WAYS = "outside", "inside", "accumulated", "many optimizers", "closure"
COMPILED = "compiled first", "compiled after", "compiled in place", "compiled step"


@pytest.mark.parametrize("ways", [WAYS, COMPILED], ids=["eager", "compiled"])
def test_plain_loop(ways: tuple[str, ...], nets: Any, tmp_path: Path) -> None:
    ran = run(tmp_path, "plain.py", *byhand.ALL, args=(tmp_path / "final.pt", *ways))
    assert ran.code == 0, ran.err
    found = torch.load(tmp_path / "final.pt")
    wanted = train_net(nets, byhand.seeded_steps(nets.batches()))
    parts = nets.batches(6)
    accumulated = train_net(nets, [[(100 + n, *parts[2 * n]), (None, *parts[2 * n + 1])] for n in range(3)])
    others = {"accumulated": accumulated, "closure": train_net_with_lbfgs(nets)}
    assert list(found) == list(ways)
    for way, got in found.items():
        byhand.assert_equal(got, others.get(way, wanted))


def test_two_ranks(nets: Any, tmp_path: Path) -> None:
    ran = run(tmp_path, "on_ranks.py", *byhand.ALL, args=(tmp_path,), launcher=TORCHRUN)
    assert ran.code == 0, ran.err
    parts = nets.batches(10)
    wanted = train_net(nets, [[(100 + n, *parts[2 * n]), (1100 + n, *parts[2 * n + 1])] for n in range(5)])
    for rank in range(2):
        left = torch.load(tmp_path / f"{rank}.pt")
        assert list(left) == ["ddp", "fsdp", "resumed"]
        for got in left.values():
            byhand.assert_equal(got, wanted)
        found = [(entry["class"], entry["steps"], entry["perturbed"]) for entry in ran.ranks[rank]["models"]]
        assert found == [("Net", 5, 6), ("FSDPNet", 5, 6), ("FSDPNet", 2, 6)]


def test_lightning(nets: Any, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    ran = run(tmp_path, "with_lightning.py", *byhand.ALL[:-2], args=(tmp_path / "final.pt",))
    assert ran.code == 0, ran.err
    model = nets.build()
    perturb_model(nn.ModuleDict({"model": model}), lam=byhand.LAM, seed=0)  # nothing is pretrained: live names
    steps = byhand.seeded_steps(nets.batches())
    wanted = byhand.train(model, steps, model, mixed=byhand.Mixed(model), is_anchored=False)
    byhand.assert_equal(torch.load(tmp_path / "final.pt"), wanted)
    assert [(entry["class"], entry["steps"]) for entry in ran.models] == [("Net", 5)]


def peft_model(source: Path, dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model

    base = classifier(source)
    return get_peft_model(
        base,
        LoraConfig(
            r=2,
            target_modules=["query", "value"],
            lora_dropout=dropout,
            modules_to_save=["classifier"],
            task_type="SEQ_CLS",
        ),
    )


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("way", ["lora", pytest.param("full", marks=pytest.mark.sweep)])
def test_peft(way: str, source: Path, tmp_path: Path) -> None:
    flags = (*byhand.NOISE, *byhand.RDROP) if way == "lora" else byhand.ALL
    ran = run(tmp_path, "with_peft.py", *flags, args=(way, source, tmp_path / "final.pt"))
    assert ran.code == 0, ran.err
    model = peft_model(source, 0.2 if way == "lora" else 0.0)
    steps = byhand.seeded_steps(rows())
    if way == "lora":
        wanted = train_classifier(model, steps, objective=byhand.two_passes)
        (note,) = ran.records[0]["notes"]
        assert note == (
            "PeftModelForSequenceClassification: noise is on base weights, which an adapter is saved without: merge "
            "them, or load it onto what surgery perturb makes with --lam 0.15 --seed 0."
        )
        assert ran.err.count(f"surgery: {note}\n") == 1
    else:
        model.requires_grad_(True)
        paths = [path for path, _ in model.named_modules()]
        adapters = [path for path in paths if "lora_" in path or "classifier" in path]
        kept = [path for path in paths if path.endswith("model.dropout")]
        wanted = train_classifier(model, steps, mixed=byhand.Mixed(model, fresh=adapters, kept=kept))
    byhand.assert_equal(torch.load(tmp_path / "final.pt"), wanted)


def sentence_folder(source: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *"one two three four five six seven eight nine ten".split()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(source)
    return source


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_sentence_transformers_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sentence_folder(seeded.bert_folder(tmp_path / "source"))
    ran = run(tmp_path, "with_sentences.py", *byhand.ALL, args=(folder, tmp_path / "final.pt"))
    assert ran.code == 0, ran.err
    monkeypatch.syspath_prepend(SCRIPTS)
    import with_sentences

    model, loss = with_sentences.build(str(folder))
    perturb_model(model, lam=byhand.LAM, seed=0)
    examples = with_sentences.pairs()
    batches = [model.smart_batching_collate(examples[start : start + 4]) for start in range(0, 20, 4)]
    mixed = byhand.Mixed(loss, fresh=["classifier"])
    steps = byhand.seeded_steps(batches)
    wanted = byhand.train(loss, steps, lambda x: loss(x, None)[1], mixed=mixed, optimizer=byhand.adamw, lr=1e-3)
    byhand.assert_equal(torch.load(tmp_path / "final.pt"), wanted)
