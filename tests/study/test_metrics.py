"""Finding a trial's metric: every place in which scripts leave it, which of several wins, and what is said of it."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from surgery.study.metrics.find import NoMetricError, find_metric
from surgery.study.metrics.found import Found
from surgery.study.metrics.output import read_output


def find(root: Path, name: str = "eval_accuracy", **how: Any) -> Found:
    return find_metric(name, root, root / "out", root / "log.txt", minimize=how.pop("minimize", False), **how)


def write(root: Path, name: str, content: Any) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


STATE = {
    "global_step": 30,
    "best_metric": 0.8,
    "log_history": [
        {"step": 10, "loss": 1.5, "eval_accuracy": 0.6},
        {"step": 20, "eval_accuracy": 0.8},
        {"step": 30, "eval_accuracy": 0.7, "epoch": 3},
    ],
}


def test_all_results_win_over_everything(tmp_path: Path) -> None:
    write(tmp_path, "out/eval_results.json", {"eval_accuracy": 0.2})
    write(tmp_path, "out/all_results.json", {"eval_accuracy": 0.1, "epoch": 3})
    write(tmp_path, "out/trainer_state.json", STATE)
    write(tmp_path, "log.txt", "eval_accuracy=0.9\n")
    assert find(tmp_path) == Found(0.1, "out/all_results.json", "")


def test_trainer_state_has_its_last_and_its_best(tmp_path: Path) -> None:
    write(tmp_path, "out/checkpoint-20/trainer_state.json", STATE | {"global_step": 20, "log_history": []})
    write(tmp_path, "out/checkpoint-30/trainer_state.json", STATE)
    file = "out/checkpoint-30/trainer_state.json"
    assert find(tmp_path) == Found(0.7, file, "of 30 steps, last of 3, best 0.8")
    assert find(tmp_path, "best:eval_accuracy") == Found(0.8, file, "of 30 steps, best of 3, last 0.7")
    assert find(tmp_path, "best:eval_accuracy", minimize=True).value == 0.6
    assert find(tmp_path, "loss").value == 1.5


def test_metrics_of_trainer_itself_are_found(tmp_path: Path) -> None:
    """What transformers really writes."""
    import torch
    from transformers import Trainer, TrainingArguments

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.layer(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": torch.ones(2), "labels": torch.tensor(0)}] * 4
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, eval_strategy="steps", eval_steps=1, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        Net(), arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=lambda _: {"accuracy": 0.75}
    )
    trainer.train()
    trainer.save_state()
    assert find(tmp_path).file == "out/trainer_state.json"
    trainer.log_metrics("eval", metrics := trainer.evaluate())
    trainer.save_metrics("eval", metrics)
    assert find(tmp_path) == Found(0.75, "out/all_results.json", "")


def test_lightnings_csv_has_its_last_row(tmp_path: Path) -> None:
    write(tmp_path, "out/lightning_logs/version_0/metrics.csv", "epoch,val_acc,loss\n0,0.5,\n0,,1.0\n1,0.6,\n1,,0.9\n")
    file = "out/lightning_logs/version_0/metrics.csv"
    assert find(tmp_path, "val_acc") == Found(0.6, file, "last of 2, best 0.6")
    assert find(tmp_path, "loss").value == 0.9


def test_csv_of_lightnings_own_logger(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path / "out")
    logger.log_metrics({"val_acc": 0.25}, step=1)
    logger.log_metrics({"val_acc": 0.5}, step=2)
    logger.save()
    assert find(tmp_path, "val_acc").value == 0.5


def test_sentence_transformers_results(tmp_path: Path) -> None:
    text = "epoch,steps,cosine_pearson,cosine_spearman\n1,-1,0.70,0.71\n2,-1,0.75,0.77\n"
    write(tmp_path, "out/eval/similarity_evaluation_sts-dev_results.csv", text)
    assert find(tmp_path, "cosine_spearman").value == 0.77


def test_event_files_of_tensorboard(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "out/runs")) as writer:
        for step, value in enumerate((0.5, 0.9, 0.8)):
            writer.add_scalar("eval/accuracy", value, step)
    found = find(tmp_path, "eval/accuracy")
    assert (found.value, found.rule) == (pytest.approx(0.8), "last of 3, best 0.9")
    assert found.file.startswith("out/runs/events.out.tfevents.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("acc=0.5\nacc=0.75\n", 0.75),
        ("acc: 0.5", 0.5),
        ('{"acc": 0.5, "x": 1}', 0.5),
        ("{'acc': np.float64(0.5)}", 0.5),
        ("acc = -1.5e-3, done", -1.5e-3),
        ("acc: 5", 5.0),
        ("acc: 5.", 5.0),
        ("acc=.5", 0.5),
        ("acc=nan", math.nan),
        ("acc = inf", math.inf),
        ("10%|#  | acc=0.1\r20%|## | acc=0.2\n", 0.2),
        ("acc: tensor(0.5000)", 0.5),
        ("acc: 71.3%", 71.3),
        ("\x1b[32macc\x1b[0m no; acc: 0.5", 0.5),
    ],
)
def test_output_is_read_as_people_write_it(text: str, expected: float, tmp_path: Path) -> None:
    write(tmp_path, "log.txt", text)
    found = find(tmp_path, "acc")
    assert found.value == pytest.approx(expected, nan_ok=True)
    assert (found.file, found.rule.partition(",")[0]) == ("log.txt", "printed")


@pytest.mark.parametrize(
    "text", ["eval_acc=0.5", "acc.x=0.5", "accuracy=1", "acc=0.5.3", "acc=1abc", "acc is 0.5", "my/acc=1"]
)
def test_output_of_another_name_or_of_no_number_is_none(text: str, tmp_path: Path) -> None:
    assert "acc" not in read_output(write(tmp_path, "log.txt", text))


def test_metric_that_is_nowhere_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "out/all_results.json", {"eval_acc": 0.1, "nested": {"f1": 0.3}, "name": "x", "ok": True})
    with pytest.raises(NoMetricError) as caught:
        find(tmp_path)
    assert str(caught.value) == (
        "metric: expected eval_accuracy in the results, got eval_acc in out/all_results.json, nested.f1 in "
        "out/all_results.json. See --metric."
    )
    with pytest.raises(NoMetricError, match=r"got no figures at all\. See --metric\."):
        find(tmp_path / "nothing")


def test_nested_figures_go_by_their_path(tmp_path: Path) -> None:
    write(tmp_path, "out/test_results.json", {"test": {"f1": 0.3}})
    assert find(tmp_path, "test.f1").value == 0.3


def test_less_deep_and_newer_files_come_first(tmp_path: Path) -> None:
    old = write(tmp_path, "out/a/eval_results.json", {"eval_accuracy": 0.1})
    write(tmp_path, "out/b/eval_results.json", {"eval_accuracy": 0.2})
    os.utime(old, (1, 1))
    assert find(tmp_path).value == 0.2
    write(tmp_path, "out/eval_results.json", {"eval_accuracy": 0.3})
    os.utime(tmp_path / "out/eval_results.json", (2, 2))
    assert find(tmp_path).value == 0.3


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        "null",
        '{"eval_accuracy": "high"}',
        '{"eval_accuracy": null}',
        "[" * 100_000,
        '{"eval_accuracy": true}',
    ],
    ids=["empty", "cut", "list", "null", "text", "none", "deep", "bool"],
)
def test_files_that_are_something_else_are_passed_by(content: str, tmp_path: Path) -> None:
    for name in ("all_results.json", "trainer_state.json", "metrics.csv", "events.out.tfevents.1"):
        write(tmp_path, f"out/{name}", content)
    write(tmp_path, "log.txt", "eval_accuracy=0.5")
    assert find(tmp_path).value == 0.5


def test_nan_of_a_script_is_its_score(tmp_path: Path) -> None:
    write(tmp_path, "out/all_results.json", '{"eval_accuracy": NaN}')
    assert math.isnan(find(tmp_path).value)
