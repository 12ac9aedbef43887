"""Steps of flat tensors, as DeepSpeed's ZeRO makes them: two ranks together do what one step of all weights does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_zero import FlatZero, FlatZero3, gather, split
from torch import nn

from surgery import Mixout, RDrop, RecAdam, SourceError, describe, patch_model, stats

LR, DECAY, STEPS = 0.05, 0.1, 4
Optimizers = Callable[..., torch.optim.Optimizer]


def net() -> nn.Module:
    """Its biases have 18 elements and its weights 120, of which no half ends where a parameter does."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 6), nn.Linear(6, 4)
    return nn.Sequential(*layers).double()


def optimizer_of(model: nn.Module, kind: Optimizers) -> torch.optim.Optimizer:
    """Make one of two groups, as Trainer does."""
    named = list(model.named_parameters())
    biases = {"params": [w for name, w in named if name.endswith("bias")], "weight_decay": 0.0}
    weights = [w for name, w in named if name.endswith("weight")]
    return kind([biases, {"params": [*weights[:1], *weights[2:], weights[1]]}], lr=LR, weight_decay=DECAY)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    torch.manual_seed(100 + step)
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randint(4, (4,))
    return nn.functional.cross_entropy(model(x), y)


def train_flat(kind: Optimizers = torch.optim.AdamW, **settings: Any) -> list[nn.Module]:
    """Train on two ranks, which have the same rows; return the model of each."""
    models = [patch_model(net(), **settings) for _ in range(2)]
    ranks = [FlatZero(optimizer_of(model, kind), rank) for rank, model in enumerate(models)]
    for step in range(STEPS):
        for model, zero in zip(models, ranks, strict=True):
            loss_of(model, step).backward()
            zero.step()
        gather(ranks)
    return models


def train(kind: Optimizers = torch.optim.AdamW, **settings: Any) -> nn.Module:
    model = patch_model(net(), **settings)
    optimizer = optimizer_of(model, kind)
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_equal(models: list[nn.Module], wanted: nn.Module) -> None:
    for model in models:
        for (name, w), expected in zip(model.named_parameters(), wanted.parameters(), strict=True):
            assert torch.allclose(w, expected, rtol=0, atol=1e-15), name


def test_anchor_by_hand() -> None:
    weight, model = 3.0, net().train()
    w_pre = {name: w.detach().clone() for name, w in model.named_parameters()}
    for step in range(STEPS):
        loss_of(model, step).backward()
        with torch.no_grad():
            for name, w in model.named_parameters():
                assert w.grad is not None
                if name.endswith("weight"):
                    w -= LR * weight * (w - w_pre[name])
                    w -= LR * (w.grad + DECAY * w)
                else:
                    w -= LR * w.grad
                w.grad = None
    found = train_flat(torch.optim.SGD, anchor=weight)
    assert_equal(found, model)
    assert [describe(one).anchored for one in found] == [STEPS, STEPS]


def test_anchor_on_shares_by_hand() -> None:
    """Of an odd number of elements the second rank's share is padded, with NaN here, of which nothing may be seen."""
    torch.manual_seed(0)
    w_pre, moved = torch.randn(2, 3, 5, dtype=torch.float64)
    found = []
    for rank in range(2):
        layer = nn.Linear(5, 3, bias=False).double()
        layer.weight.data = moved.clone()
        split(layer.weight, rank)
        patch_model(layer, anchor=3.0, w_pre={"weight": w_pre})
        zero = FlatZero3(torch.optim.SGD([layer.weight], lr=LR))
        for _ in range(STEPS):
            zero.step()
        found.append(layer.weight.ds_tensor[: 8 - rank])  # type: ignore[index]
        assert describe(layer).anchored == STEPS
    for _ in range(STEPS):
        moved -= LR * 3.0 * (moved - w_pre)
    assert torch.allclose(torch.cat(found), moved.reshape(-1), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "settings",
    [
        {"anchor": 3.0, "mixout": Mixout(0.5)},
        {"recadam": RecAdam(gamma=8.0, k=1.0, t0=2)},
        {"rdrop": RDrop(1.0, every=2)},
        {"anchor": 3.0, "rdrop": 1.0},
    ],
    ids=["anchor-mixout", "recadam", "every", "anchor-rdrop"],
)
def test_flat_steps_equal_plain_ones(settings: dict[str, Any]) -> None:
    wanted = train(**settings)
    found = train_flat(**settings)
    assert_equal(found, wanted)
    facts = [
        (one.anchored, one.recalled, one.recadam_t, one.fired, one.missed, one.unmixed)
        for one in map(describe, [*found, wanted])
    ]
    assert facts[0] == facts[1] == facts[2]
    assert stats(found[0])["distance" if "rdrop" not in settings or "anchor" in settings else "kl"]


def test_steps_without_a_forward_in_training_mode_are_told() -> None:
    model = patch_model(net(), rdrop=1.0)
    zero = FlatZero(optimizer_of(model, torch.optim.SGD), 0)
    loss_of(model.eval(), 0).backward()
    with pytest.raises(SourceError, match=r"^rdrop: expected a forward of the patched model in training mode before"):
        zero.step()


def test_an_unmixed_step_of_several_groups_is_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(net(), mixout=0.5)
    zero = FlatZero(optimizer_of(model, torch.optim.SGD), 0)
    for step in range(3):
        loss_of(model.train(step == 0), step).backward()
        zero.step()
    assert describe(model).unmixed == 2
    assert caplog.text.count("nothing is mixed") == 1
