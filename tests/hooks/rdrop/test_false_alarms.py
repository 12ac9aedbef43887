"""Optimizer steps that Mixout and R-Drop have their part in, however a script trains: no alarm."""

import itertools
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import functional as F  # noqa: N812

from surgery import RDrop, describe, patch_model

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2


def itself(model: Any) -> Any:
    return model


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(X), Y)


def with_accumulation(model: nn.Module) -> None:
    for _ in range(3):
        loss_of(model).backward()
        loss_of(model).backward()
        sgd(model).step()


def with_a_scaler_that_skips(model: nn.Module) -> None:
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1e38)
    for _ in range(6):
        scaler.scale(loss_of(model) * 1e6).backward()
        scaler.step(optimizer)
        scaler.update(1.0 if scaler.get_scale() > 1 else 1e38)
        optimizer.zero_grad()


def with_two_optimizers(model: Any) -> None:
    halves = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters())
    for _ in range(3):
        loss_of(model).backward()
        for optimizer in halves:
            optimizer.step()


def of_two_models_in_turn(model: nn.Module) -> None:
    """One optimizer; each step trains one of the models, and leaves the other with gradients of 0."""
    other = deepcopy(model)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    for trained in (model, other, model, model, other, other):
        loss_of(trained).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def after_another_loss(model: nn.Module) -> None:
    """One optimizer; between forward and backward, another model is stepped."""
    other = nn.Linear(4, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    for _ in range(3):
        loss = loss_of(model)
        for each in (loss_of(other), loss):
            each.backward()
            optimizer.step()
            optimizer.zero_grad()


class Nested(torch.optim.Optimizer):
    """Wraps an optimizer, as SAM does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        loss = closure()
        self.inner.step()
        return loss


def with_an_optimizer_within_another(model: nn.Module) -> None:
    optimizer = Nested(sgd(model))
    for _ in range(3):
        optimizer.step(lambda: loss_of(model).backward())


def after_state_was_made(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    get_optimizer_state_dict(model, optimizer)
    loss_of(model).backward()
    optimizer.step()


def with_evaluations(model: nn.Module) -> None:
    optimizer = sgd(model)
    for _ in range(3):
        model.eval()
        loss_of(model)
        with torch.no_grad():
            loss_of(model)
        model.train()
        loss_of(model).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "copied"),
    [
        *itertools.product([{"mixout": 0.5}, {"rdrop": 1.0}, {"rdrop": RDrop(1.0, every=2)}], [itself, deepcopy]),
        ({"rdrop": 1.0}, pickled),  # one of Mixout is refused in training
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize(
    "act",
    [
        with_accumulation,
        with_a_scaler_that_skips,
        with_two_optimizers,
        of_two_models_in_turn,
        after_another_loss,
        with_an_optimizer_within_another,
        after_state_was_made,
        with_evaluations,
    ],
    ids=lambda act: act.__name__,
)
def test_training_is_no_alarm(
    act: Callable[[nn.Module], None], settings: Any, copied: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = copied(patch_model(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 2)), **settings))
    act(model)
    act(model)
    assert (caplog.messages, describe(model).unmixed, describe(model).missed) == ([], 0, 0)
