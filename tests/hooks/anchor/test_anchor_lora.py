"""Decay of W = W0 + s B A toward w_pre: autograd's gradient of 1/2 ||W - w_pre||^2 in float64, step by step."""

from typing import Any

import adapted
import pytest
import seeded
import torch
from adapted import CASES, LINEAR, Case, inputs, layer_of, trainable
from peft import LoraConfig, get_peft_model
from torch import nn

from surgery import Anchor, SourceError, describe, patch_model, stats, unpatch_model

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning")
WEIGHT, LR = 0.05, 0.1


def slopes(case: Case, layer: Any, of: adapted.Factors, start: adapted.Factors) -> dict[str, tuple[torch.Tensor, ...]]:
    """The gradient of 1/2 ||W - w_pre||_F^2 by autograd, on the merged weight."""
    leaves = {name: tuple(w.detach().clone().requires_grad_() for w in pair) for name, pair in of.items()}
    difference = adapted.delta(case, layer, leaves) - (adapted.delta(case, layer, start) if start else 0)
    (difference.square().sum() / 2).backward()
    return {name: (a.grad, b.grad) for name, (a, b) in leaves.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_five_steps_are_those_of_a_loop_by_hand(case: Case) -> None:
    model = adapted.make(case)
    start = adapted.start_of(case, model)
    adapted.train_away(patch_model(model, anchor=WEIGHT))
    layer = layer_of(model)
    by_hand = {name: tuple(w.requires_grad_() for w in pair) for name, pair in adapted.factors(model).items()}
    leaves = [w for pair in by_hand.values() for w in pair]
    optimizer, optimizer_by_hand = torch.optim.Adam(trainable(model), LR), torch.optim.Adam(leaves, LR)
    w0 = adapted.base_weight(case, layer)
    for step in range(5):
        x = inputs(case, seed=step)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer_by_hand.zero_grad()
        adapted.apply(case, layer, w0 + adapted.delta(case, layer, by_hand), x).square().mean().backward()
        for name, pair in slopes(case, layer, by_hand, start).items():
            for w, slope in zip(by_hand[name], pair, strict=True):
                w.data -= LR * WEIGHT * slope
        optimizer_by_hand.step()
    for name, pair in adapted.factors(model).items():
        for got, wanted in zip(pair, by_hand[name], strict=True):
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-9, atol=1e-12)
    assert describe(model).anchored == 5
    assert stats(model)["w_pre_bytes"] == (sum(w.nbytes for w in leaves) if start else 0)


def step_with(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Step with gradients of 0, so that what changes is the decay."""
    for w in trainable(model):
        w.grad = torch.zeros_like(w)
    optimizer.step()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_each_factor_is_decayed_with_the_lr_of_its_group(weight: float) -> None:
    model = adapted.train_away(patch_model(adapted.make(), anchor=Anchor(weight)))
    layer = layer_of(model)
    before = adapted.factors(model)
    slope_a, slope_b = slopes(LINEAR, layer, before, {})["default"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    step_with(model, torch.optim.SGD([{"params": [a], "lr": 0.01}, {"params": [b], "lr": 0.16}]))
    torch.testing.assert_close(a.detach(), before["default"][0] - 0.01 * weight * slope_a, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(b.detach(), before["default"][1] - 0.16 * weight * slope_b, rtol=1e-12, atol=1e-14)


def test_frozen_factor_stays() -> None:
    model = adapted.train_away(patch_model(adapted.make(), anchor=0.5))
    layer = layer_of(model)
    layer.lora_A["default"].requires_grad_(False)
    before = adapted.factors(model)["default"]
    step_with(model, torch.optim.SGD(trainable(model), LR))
    assert torch.equal(layer.lora_A["default"].weight, before[0])
    assert not torch.equal(layer.lora_B["default"].weight, before[1])


@pytest.mark.parametrize("case", [LINEAR, CASES[6], CASES[7]], ids=str)
def test_decay_alone_takes_the_weight_to_w_pre(case: Case) -> None:
    model = adapted.train_away(patch_model(adapted.make(case), anchor=1.0))
    optimizer = torch.optim.SGD(trainable(model), 0.02)
    distances = [stats(model)["distance"]]
    for _ in range(100):
        step_with(model, optimizer)
        distances.append(stats(model)["distance"])
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.2 * distances[0]


def test_bfloat16_is_rounded_once() -> None:
    model = adapted.train_away(patch_model(adapted.make(dtype=torch.bfloat16), anchor=0.5))
    before = {name: tuple(w.double() for w in pair) for name, pair in adapted.factors(model).items()}
    wanted = slopes(LINEAR, layer_of(model), before, {})["default"]
    step_with(model, torch.optim.SGD(trainable(model), LR))
    for got, w, slope in zip(adapted.factors(model)["default"], before["default"], wanted, strict=True):
        exact = w - LR * 0.5 * slope
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)
        assert float((got.double() - w).abs().sum()) > 0


def test_step_of_a_merged_adapter_is_refused() -> None:
    model = adapted.train_away(patch_model(adapted.make(), anchor=0.5))
    model.merge_adapter()
    before = adapted.factors(model)["default"]
    with pytest.raises(SourceError, match="expected adapters beside their base, got 'default' merged into it"):
        step_with(model, torch.optim.SGD(trainable(model), LR))
    assert all(map(torch.equal, adapted.factors(model)["default"], before))


def train_by_hand(model: Any) -> None:
    for _ in range(4):
        model.zero_grad()
        model(inputs()).square().sum().backward()
        with torch.no_grad():
            for w in trainable(model):
                w -= 0.01 * w.grad


def test_factors_that_change_without_a_step_are_reported() -> None:
    model = patch_model(adapted.make(), anchor=0.5)
    with pytest.raises(SourceError, match=r"^anchor: expected a step of a torch.optim.Optimizer that holds base_model"):
        train_by_hand(model)


def test_copies_of_layers_are_anchored_beside_lora() -> None:
    layers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])).double()
    adapted.train_away(patch_model(model, anchor=0.5))
    saved = model.base_model.model[1].modules_to_save["default"].weight
    w, original = saved.detach().clone(), model.base_model.model[1].original_module.weight
    squares = adapted.delta(LINEAR, layer_of(model), adapted.factors(model)).square().sum()
    squares += (w - original).square().sum()
    assert stats(model)["distance"] == pytest.approx(float(squares.sqrt()), rel=1e-12)
    step_with(model, torch.optim.SGD(trainable(model), LR))
    torch.testing.assert_close(saved.detach(), w - LR * 0.5 * (w - original), rtol=1e-12, atol=1e-14)


def test_dropout_stays_and_unpatched_model_is_what_it_was() -> None:
    model = adapted.make(lora_dropout=0.25)
    before = seeded.fingerprint(model)
    patch_model(model, anchor=0.5)
    assert layer_of(model).lora_dropout["default"].p == 0.25
    assert seeded.fingerprint(unpatch_model(model)) == before
