"""Steps and losses that R-Drop has no part in: refused, or said."""

import logging
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from surgery import RDrop, SourceError, describe, patch_model, stats

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
IDLE = "rdrop: expected a forward of the patched model in training mode before the optimizer's step"


def net(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    return patch_model(model, rdrop=RDrop(1.0, **settings))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    F.cross_entropy(model(X), Y).backward()
    for optimizer in optimizers:
        optimizer.step()


def test_closure_without_a_forward_in_training_mode_is_refused() -> None:
    model = net().eval()

    def closure() -> torch.Tensor:
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    with pytest.raises(SourceError, match=IDLE):
        sgd(model).step(closure)
    model.train()
    sgd(model).step(closure)


def test_eval_mode_left_on_is_warned_of_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = sgd(model)
    train(model, optimizer)
    model.eval()
    with caplog.at_level(logging.WARNING, "surgery"):
        for _ in range(3):
            train(model, optimizer)
    assert [record.message.startswith(IDLE) for record in caplog.records] == [True]
    assert "NOT IN       3 optimizer steps" in str(describe(model))
    train(model.train(), optimizer)
    assert (describe(model).missed, stats(model)["rdrop_fired"]) == (3, 2)


@pytest.mark.parametrize("steps", [1, 2], ids=["after a step without", "after a step with"])
def test_eval_mode_left_on_is_noticed_whatever_step_is_due(steps: int) -> None:
    model = net(every=2)
    optimizer = sgd(model)
    for _ in range(steps):
        train(model, optimizer)
    copy = deepcopy(model).eval()
    for _ in range(3):
        train(model.eval(), optimizer)
    assert describe(model).missed == 3
    with pytest.raises(SourceError, match=IDLE):
        train(copy, sgd(copy))


def test_steps_of_a_wholly_split_model_are_counted() -> None:
    """While a forward runs, fully_shard has other parameters in the place of those that the optimizer holds."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(net(every=2), mesh=init_device_mesh("cpu", (1,)))
        optimizer = sgd(model)
        for _ in range(4):
            train(model, optimizer)
        train(model.eval(), optimizer)
    finally:
        dist.destroy_process_group()
    assert (stats(model)["rdrop_fired"], describe(model).missed) == (2, 1)


@pytest.mark.parametrize("every", [1, 2])
def test_model_that_is_never_in_training_mode_is_refused(every: int) -> None:
    model = net(every=every).eval()
    with pytest.raises(SourceError, match=IDLE):
        train(model, sgd(model))


def test_both_models_of_one_loss_have_fired() -> None:
    encoder, head = net(), patch_model(nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 3)), rdrop=1.0)
    F.cross_entropy(head(encoder(X)), Y).backward()
    F.cross_entropy(encoder(X) + head(X[:, :3]), Y).backward()
    sgd(encoder).step()
    sgd(head).step()
    assert [stats(model)["rdrop_fired"] for model in (encoder, head)] == [2, 2]


class Focal(nn.Module):
    """A focal loss in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows = F.cross_entropy(self.net(x), y, reduction="none")
        return ((1 - torch.exp(-rows)) ** 2 * rows).mean()


def test_focal_loss_of_rows_is_refused() -> None:
    message = "rdrop: expected a loss that is a weighted sum of its rows, or of log-probabilities, got exp of them"
    rows = F.cross_entropy(net()(X), Y, reduction="none")
    with pytest.raises(SourceError, match=message):
        torch.exp(-rows)
    with pytest.raises(SourceError, match=message):
        patch_model(Focal(), rdrop=1.0)(X, Y)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda rows: (rows * torch.arange(8)).sum() / 28,
        lambda rows: rows.topk(3)[0].mean(),
        lambda rows: rows @ X[:, 0],
    ],
    ids=["weights", "hardest", "product"],
)
def test_weighted_rows_are_taken(reduce: Any) -> None:
    model = net()
    reduce(F.cross_entropy(model(X), Y, reduction="none")).backward()
    assert stats(model)["rdrop_fired"] == 1


def test_figures_of_a_hand_made_smoothing_are_those_of_the_whole_loss() -> None:
    model = net()
    torch.manual_seed(1)
    lp = model(X).log_softmax(-1)
    (0.9 * -lp.gather(1, Y[:, None]).squeeze(1) + 0.1 * -lp.mean(-1)).mean().backward()
    by_hand = stats(model)
    torch.manual_seed(1)
    F.cross_entropy(model(X), Y, label_smoothing=0.1).backward()
    torch.testing.assert_close([by_hand["ce"], by_hand["kl"]], [stats(model)["ce"], stats(model)["kl"]])


def test_loss_without_a_formula_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with caplog.at_level(logging.WARNING, "surgery"):
        for _ in range(2):
            logits = model(X)
            (F.cross_entropy(logits, Y) + F.l1_loss(logits, X[:, :3])).backward()
    assert [record.message for record in caplog.records] == [
        "rdrop: no formula for l1_loss: it is taken from the second pass, as it is."
    ]
    assert describe(model).unjoined == ("l1_loss",)


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: ARG004
        return grad


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, Y)


def behind_a_function(logits: torch.Tensor) -> torch.Tensor:
    return loss_of(Identity.apply(logits))


def behind_a_function_once_written_to(logits: torch.Tensor) -> torch.Tensor:
    return behind_a_function(logits.mul_(2))


def behind_a_reentrant_checkpoint(logits: torch.Tensor) -> torch.Tensor:
    return checkpoint(loss_of, logits, use_reentrant=True)


class Inert(Identity):
    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: ARG004
        return None


def behind_vmap(logits: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(F.cross_entropy)(logits, Y).mean()


@pytest.mark.parametrize(
    "loss",
    [behind_a_function, behind_a_function_once_written_to, behind_a_reentrant_checkpoint, behind_vmap],
    ids=lambda loss: loss.__name__,
)
def test_loss_that_the_first_pass_does_not_reach_is_warned_of_once(loss: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with caplog.at_level(logging.WARNING, "surgery"):
        for _ in range(2):
            logits = model(X)
            (loss(logits) + loss_of(logits)).backward()
    what = "an autograd function on the outputs, or the like"
    assert [record.message for record in caplog.records] == [
        f"rdrop: no formula for {what}: it is taken from the second pass, as it is."
    ]
    assert (describe(model).unjoined, stats(model)["rdrop_fired"]) == ((what,), 2)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: checkpoint(loss_of, logits, use_reentrant=False),
        lambda logits: loss_of(logits.mul_(2)),
        lambda logits: loss_of(logits) + logits[:1, 0].mean(),
        lambda logits: Identity.apply(loss_of(logits) + logits[:1, 0].mean()),
        lambda logits: loss_of(logits) + Inert.apply(logits).mean(),
        lambda logits: F.cross_entropy(logits[1:].contiguous().view(7, 3).float(), Y[1:]),
    ],
    ids=["checkpoint", "in place", "another term", "whole loss", "no gradient", "views"],
)
def test_loss_that_both_passes_reach_is_not_warned_of(loss: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    torch.autograd.backward(loss(model(X)))
    assert (caplog.messages, describe(model).unjoined) == ([], ())


def test_output_that_is_written_to_stays_the_same_object() -> None:
    logits = net()(X)
    assert logits.mul_(2) is logits is logits.contiguous()


def test_description_of_rdrop_alone_names_no_weights() -> None:
    assert describe(net()).left == {}
