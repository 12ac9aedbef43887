"""Runs of transformers' real Trainer on tiny models, and what they have logged."""

from pathlib import Path
from typing import Any

import seeded
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments


class Reporter(TrainerCallback):
    """Keeps what a reporter, such as TensorBoard's, would send."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        self.logs.append(dict(logs))


def rows(count: int) -> list[dict[str, Any]]:
    """Rows that can be learned: the label says whether the first token is of the upper half."""
    batch = seeded.batch(count)
    labels = (batch["input_ids"][:, 0] >= seeded.VOCAB // 2).long()
    return [{"input_ids": ids, "labels": label} for ids, label in zip(batch["input_ids"], labels, strict=True)]


def trainer(model: nn.Module, folder: Path, *, callbacks: Any = (), data: Any = None, **settings: Any) -> Trainer:
    given = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3, "seed": 1}
    given |= {"report_to": "none"} | settings
    args = TrainingArguments(folder, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, **given)
    data = data or rows(32)
    return Trainer(model, args, train_dataset=data, eval_dataset=data[:8], callbacks=list(callbacks))


def trained(model: nn.Module, folder: Path, **settings: Any) -> Any:
    run = trainer(model, folder, **settings)
    run.train()
    return run


def losses(run: Trainer) -> list[float]:
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, w), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(w, expected), name
