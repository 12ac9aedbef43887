"""R-Drop under transformers' real Trainer, against two forward passes and the paper's equation."""

from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from heads import HEADS, TOKENS, Head, grads_of, symmetric_kl
from test_trainer import Reporter, assert_same, losses, rows, trained, trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812
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
        **{"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
        **{"gradient_accumulation_steps": accumulated, "train_sampling_strategy": "sequential"},
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
