"""R-Drop under transformers' real Trainer, against two forward passes and the paper's equation."""

from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from heads import HEADS, TOKENS, Head, grads_of, symmetric_kl
from torch import nn
from torch.nn import functional as F  # noqa: N812
from trainers import Reporter, assert_same, losses, trained, trainer
from transformers import Trainer

from surgery import Mixout, RDrop, SurgeryCallback, patch_model, stats, unpatch_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
]
ALPHA = 1.5


class Wave(nn.Module):
    """Stands for dropout, with a mask that a row has whatever batch it is in: another one at every other call.

    Args:
        period: 1 for the same at each call.
    """

    def __init__(self, period: int = 2) -> None:
        super().__init__()
        self.period = period
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return x * (1 + 0.2 * torch.cos(40 * (1 + self.calls % self.period) * x.detach()))


def waving(name: str, period: int = 2) -> Any:
    """A model whose only randomness is a Wave."""
    model = HEADS[name].model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if name == "llama":
        model.model.norm = nn.Sequential(model.model.norm, Wave(period))
    else:
        model.dropout = Wave(period)
    return model


def rows_of(name: str) -> list[dict[str, torch.Tensor]]:
    """Sixteen rows; those of a causal LM have from 1 to 7 labels."""
    head: Head = HEADS[name]
    made = [{key: head.batch[key][i % 4] for key in ("input_ids", "labels")} for i in range(16)]
    for number, row in enumerate(made):
        row["input_ids"] = (row["input_ids"] + number) % 40
        if row["labels"].dim():
            row["labels"] = torch.where(torch.arange(8) < 1 + number % 7, TOKENS[1].clamp(min=0), -100)
            row["labels"][1] = 2
    return made


def gradient(model: Any, data: Any, folder: Path, *, accumulated: int, **settings: Any) -> dict[str, torch.Tensor]:
    """The gradient of one step of Trainer, from what plain SGD does to the weights."""
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    run = trainer(
        model,
        folder,
        data=data,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        gradient_accumulation_steps=accumulated,
        train_sampling_strategy="sequential",
        **settings,
    )
    run.args.per_device_train_batch_size = run._train_batch_size = 16 // accumulated
    run.train()
    return {name: before[name] - w.detach() for name, w in model.named_parameters()}


def norm(grads: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([grad.flatten() for grad in grads.values()]).norm())


@pytest.mark.parametrize("name", ["llama", "single-label"])
def test_accumulated_gradient_is_that_of_one_batch_as_far_as_the_stock_one_is(name: str, tmp_path: Path) -> None:
    data = rows_of(name)
    stock = [gradient(waving(name, 1), data, tmp_path, accumulated=steps) for steps in (1, 4)]
    ratio = round(norm(stock[1]) / norm(stock[0]), 3)
    assert ratio == {"llama": 1.0, "single-label": 4.0}[name]  # heads of BERT ignore num_items_in_batch
    one, four = (
        gradient(patch_model(waving(name), rdrop=RDrop(ALPHA)), data, tmp_path, accumulated=steps) for steps in (1, 4)
    )
    assert norm(one) > 1e-3
    torch.testing.assert_close(four, {key: ratio * grad for key, grad in one.items()}, rtol=1e-5, atol=1e-7)
    assert abs(norm(one) / norm(stock[0]) - 1) > 1e-4  # the KL is in it


# -- losses that the Trainer, or its user, makes -------------------------------------------------------------------


class Weighted(Trainer):
    """Reads the labels, has the model make its loss, and makes another of the logits."""

    weight: torch.Tensor | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.get("labels")
        outputs = model(**inputs)
        loss = nn.CrossEntropyLoss(weight=self.weight)(outputs.get("logits").view(-1, 3), labels.view(-1))
        return (loss, outputs) if return_outputs else loss


def by_hand(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / (num_items_in_batch or len(labels))


def of(run: Trainer, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    loss = run.compute_loss(model, dict(batch))
    loss.backward()  # type: ignore[union-attr]
    return {"loss": loss.detach(), **grads_of(model)}  # type: ignore[union-attr]


def expect(
    model: Any, batch: dict[str, torch.Tensor], *, smoothing: float = 0.0, weight: Any = None, alpha: float = ALPHA
) -> dict[str, torch.Tensor]:
    """Two passes, the loss of each, and S."""
    torch.manual_seed(3)
    a, b = (model(batch["input_ids"]).logits for _ in range(2))
    ce = sum(F.cross_entropy(x, batch["labels"], label_smoothing=smoothing, weight=weight) for x in (a, b)) / 2
    loss = ce + alpha / 2 * symmetric_kl(a, b).mean()
    loss.backward()
    return {"loss": loss.detach(), **grads_of(model)}


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "label-smoothing": ({"label_smoothing_factor": 0.1}, {"smoothing": 0.1}),
    "compute_loss_func": ({}, {}),
    "override": ({}, {}),
    "override-weighted": ({}, {"weight": torch.tensor([1.0, 2.0, 0.5]).double(), "alpha": 0.0}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_outside_of_the_model_are_joined(name: str, tmp_path: Path) -> None:
    settings, expected = LOSSES[name]
    batch = {key: HEADS["single-label"].batch[key] for key in ("input_ids", "labels")}
    plain = HEADS["single-label"].model()
    model = patch_model(HEADS["single-label"].model(), rdrop=RDrop(expected.get("alpha", ALPHA), passes="two"))
    args = trainer(model, tmp_path, **settings).args
    if name.startswith("override"):
        run: Trainer = Weighted(model, args)
        run.weight = expected.get("weight")  # type: ignore[attr-defined]
    else:
        run = Trainer(model, args, compute_loss_func=by_hand if name == "compute_loss_func" else None)
    exact = 1e-6 if name == "label-smoothing" else 1e-10  # LabelSmoother sums in float32
    torch.testing.assert_close(of(run, model, batch), expect(plain, batch, **expected), rtol=exact, atol=exact)


def test_loss_made_again_of_a_doubled_batch_is_joined(tmp_path: Path) -> None:
    batch = {key: HEADS["single-label"].batch[key] for key in ("input_ids", "labels")}
    model = patch_model(HEADS["single-label"].model(), rdrop=RDrop(ALPHA, passes="doubled"))
    got = of(Weighted(model, trainer(model, tmp_path).args), model, batch)
    torch.manual_seed(3)
    within = model(**batch).loss
    torch.testing.assert_close(got["loss"], within.detach(), rtol=1e-10, atol=1e-10)


# -- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", ["two", "doubled"])
def test_trainer_learns_and_logs_both_terms(passes: Any, tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), rdrop=RDrop(1.0, passes=passes))
    run = trainer(model, tmp_path, callbacks=[SurgeryCallback()], max_steps=40, learning_rate=5e-3, logging_steps=10)
    reporter = Reporter()
    run.callback_handler.callbacks.insert(0, reporter)
    run.train()
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    for logs in (run.state.log_history, reporter.logs):
        for log in [log for log in logs if "loss" in log]:
            assert log["rdrop_ce"] + log["rdrop_kl"] / 2 == pytest.approx(log["loss"], abs=2e-4)
            assert log["rdrop_kl"] > 0
            assert "w_pre_distance" not in log
    assert stats(model)["rdrop_fired"] == 40


def test_evaluation_in_between_is_that_of_the_plain_model(tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), rdrop=1.0)
    run = trained(model, tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="no")
    found = run.evaluate()["eval_loss"]
    logged = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    assert logged[-1] == found == run.evaluate()["eval_loss"]
    unpatch_model(model)
    assert trainer(model, tmp_path).evaluate()["eval_loss"] == found
    assert stats(patch_model(model, rdrop=1.0))["rdrop_fired"] == 0


@pytest.mark.parametrize(
    "settings",
    [{"rdrop": 1.0}, {"rdrop": RDrop(1.0, every=2)}, {"rdrop": 1.0, "mixout": Mixout(0.5)}],
    ids=["rdrop", "every-2nd", "mixout"],
)
def test_resumed_run_ends_as_the_whole_one(settings: dict[str, Any], tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    base = seeded.bert_folder(tmp_path / "base")
    given = settings | ({"w_pre": base} if "mixout" in settings else {})
    whole = patch_model(seeded.bert(seed=2), **given)
    trained(whole, tmp_path / "run", callbacks=[SurgeryCallback()], **steps)
    resumed = patch_model(seeded.bert(seed=2), **given)
    again = trainer(resumed, tmp_path / "run", callbacks=[SurgeryCallback()], **steps)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(resumed, whole)


def test_bf16_trains(tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), rdrop=1.0)
    run = trained(model, tmp_path, bf16=True, max_steps=2, callbacks=[SurgeryCallback()])
    assert [log["rdrop_kl"] > 0 for log in run.state.log_history if "loss" in log] == [True, True]
