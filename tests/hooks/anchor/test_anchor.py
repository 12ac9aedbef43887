"""Decay toward w_pre against loops written by hand in float64, for optimizers of every kind."""

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from transformers.optimization import Adafactor

from surgery.errors import SettingError, SourceError
from surgery.hooks import Anchor, Mixout, describe, patch_model, patched, stats, unpatch_model

STEPS = 6


class Signed(torch.optim.Optimizer):
    """One of one's own: w <- w - lr * sign(grad)."""

    def __init__(self, params: Any, lr: Any) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    w.sub_(group["lr"] * w.grad.sign())
        return loss


class Sam(torch.optim.Optimizer):
    """As davda54/sam has it: climbs, asks for the gradient there, and lets another optimizer step."""

    def __init__(self, params: Any, base: type[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.base = base(self.param_groups, lr)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        kept = [w.clone() for group in self.param_groups for w in group["params"]]
        for group in self.param_groups:
            for w in group["params"]:
                w.add_(w.grad, alpha=0.05)
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        for w, old in zip((w for group in self.param_groups for w in group["params"]), kept, strict=True):
            w.copy_(old)
        self.base.step()
        return loss


class Several(torch.optim.Optimizer):
    """Has others step, and none of their parameters."""

    def __init__(self, *others: torch.optim.Optimizer) -> None:
        super().__init__([torch.zeros(1)], {})
        self.others = others

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for other in self.others:
            other.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for other in self.others:
            other.zero_grad(set_to_none)


class Lookahead:
    """Wraps an optimizer, and is none."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.zero_grad = base, base.param_groups, base.zero_grad

    def step(self) -> None:
        self.base.step()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(seed: int) -> torch.Tensor:
    return torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return model(data(seed)).square().mean()


def by_hand(
    make: Callable[[nn.Module], Any], weight: float, *, accumulate: int = 1, each: Callable[[Any], None] | None = None
) -> nn.Sequential:
    """Train without a patch, and pull the matrices to where they began before every step that has a gradient."""
    model = network()
    w_pre = {name: w.detach().clone() for name, w in model.named_parameters()}
    optimizer = make(model)
    holder = optimizer.others[0] if isinstance(optimizer, Several) else optimizer
    lrs = {id(w): group for group in holder.param_groups for w in group["params"]}
    for step in range(STEPS):
        for part in range(accumulate):
            loss_of(model, step * accumulate + part).backward()
        with torch.no_grad():
            for name, w in model.named_parameters():
                if w.dim() == 2 and w.grad is not None:
                    w.copy_(w - float(lrs[id(w)]["lr"]) * weight * (w - w_pre[name]))
        advance(optimizer, model, step)
        if each:
            each(optimizer)
    return model


def by_patch(
    make: Callable[[nn.Module], Any], weight: float, *, accumulate: int = 1, each: Callable[[Any], None] | None = None
) -> nn.Sequential:
    model = patch_model(network(), anchor=weight)
    optimizer = make(model)
    for step in range(STEPS):
        for part in range(accumulate):
            loss_of(model, step * accumulate + part).backward()
        advance(optimizer, model, step)
        if each:
            each(optimizer)
    assert describe(model).anchored == STEPS
    return model


def advance(optimizer: Any, model: nn.Module, step: int) -> None:
    if isinstance(optimizer, Sam | torch.optim.LBFGS):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)
    else:
        optimizer.step()
    optimizer.zero_grad()


def assert_close(model: nn.Module, expected: nn.Module) -> None:
    for (name, w), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(w, other, rtol=1e-12, atol=1e-14, msg=name)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters()), "lr": 0.3}, {"params": list(model[2].parameters()), "lr": 0.02}]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1),
    "adamw-fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, fused=True),
    "adamw-foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, foreach=True),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    "own": lambda model: Signed(model.parameters(), 0.02),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3),
    "groups": lambda model: torch.optim.SGD(groups(model), lr=1.0),
    "tensor-lr": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.05)),
    "sam": lambda model: Sam(model.parameters(), Signed, 0.02),
    "several": lambda model: Several(torch.optim.SGD(model.parameters(), lr=0.1)),
    "lookahead": lambda model: Lookahead(torch.optim.SGD(model.parameters(), lr=0.1)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_anchor_decays_as_the_loop_by_hand(make: Callable[[nn.Module], Any]) -> None:
    model, expected, plain = by_patch(make, 0.4), by_hand(make, 0.4), by_hand(make, 0.0)
    assert_close(model, expected)
    assert (model[0].weight - plain[0].weight).abs().max() > 1e-4


def test_anchor_decays_once_per_optimizer_step_of_accumulated_gradients() -> None:
    make = OPTIMIZERS["adamw"]
    assert_close(by_patch(make, 0.4, accumulate=3), by_hand(make, 0.4, accumulate=3))


@pytest.mark.parametrize("name", ["sgd", "tensor-lr", "groups"])
def test_anchor_follows_a_scheduler(name: str) -> None:
    def trained(run: Callable[..., nn.Module]) -> nn.Module:
        schedulers: list[Any] = []

        def make(model: nn.Module) -> Any:
            optimizer = OPTIMIZERS[name](model)
            schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
            return optimizer

        return run(make, 0.4, each=lambda _: schedulers[0].step())

    assert_close(trained(by_patch), trained(by_hand))


def test_anchor_moves_nothing_but_the_chosen_weights_with_a_gradient() -> None:
    model = patch_model(network(), anchor=1.0, exclude="2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    optimizer.step()
    moved = {name: (before[name] - w).unique().tolist() for name, w in model.state_dict().items()}
    assert moved.pop("0.weight") == pytest.approx([0.25])
    assert set(map(tuple, moved.values())) == {(0.0,)}
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model[0].weight, before["0.weight"] - 0.25)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_anchor_rests_in_steps_that_the_grad_scaler_skips(fused: bool) -> None:
    model = patch_model(network().float(), anchor=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = deepcopy(model.state_dict())
    for factor in (torch.inf, 1.0):
        scaler.scale(model(data(0).float()).sum() * factor).backward()
        with torch.no_grad():
            model[0].weight.add_(1 if factor == torch.inf else 0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if factor == torch.inf:
            assert torch.equal(model[0].weight, before["0.weight"] + 1)
            assert describe(model).anchored == 0
    assert describe(model).anchored == 1


def test_anchor_works_after_a_step_that_raised() -> None:
    model = patch_model(network(), anchor=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()

    def fails() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    optimizer.step()
    optimizer.step()
    assert describe(model).anchored == 3


@pytest.mark.usefixtures("alone")
def test_two_models_are_anchored_each_to_its_own() -> None:
    first, second = patch_model(network(1), anchor=1.0), patch_model(network(2), anchor=0.5)
    expected = []
    for model, weight in ((first, 1.0), (second, 0.5)):
        w_pre = model[0].weight.detach().clone()
        with torch.no_grad():
            model[0].weight.add_(1)
        expected.append(model[0].weight.detach() - 0.1 * weight * (model[0].weight.detach() - w_pre))
    for parameter in [*first.parameters(), *second.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1).step()
    for model, w in zip((first, second), expected, strict=True):
        torch.testing.assert_close(model[0].weight.detach(), w, rtol=1e-12, atol=0)
    unpatch_model(first)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == 1
    unpatch_model(second)
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not torch_optimizer._global_optimizer_post_hooks


def test_copy_of_an_anchored_model_is_anchored() -> None:
    model = deepcopy(patch_model(network(), anchor=1.0))
    loss_of(model, 0).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert describe(model).anchored == 1
    unpatch_model(model)


def in_data(w: nn.Parameter) -> None:
    w.data -= 0.1 * w.grad  # type: ignore[operator]


def in_place(w: nn.Parameter) -> None:
    with torch.no_grad():
        w -= 0.1 * w.grad  # type: ignore[operator]


@pytest.mark.parametrize("update", [in_data, in_place], ids=lambda update: update.__name__)
def test_loop_without_an_optimizer_is_refused_within_two_steps(update: Callable[[nn.Parameter], None]) -> None:
    model = patch_model(network(), anchor=0.1)
    message = r"^anchor: expected a step of a torch\.optim\.Optimizer that holds 0\.weight, got weights that change "
    for step in range(2):
        loss_of(model, step).backward()
        for parameter in model.parameters():
            update(parameter)
            parameter.grad = None
    with pytest.raises(SourceError, match=message):
        loss_of(model, 2)


def test_optimizer_of_other_weights_does_not_hide_that_ours_are_not_anchored() -> None:
    model, other = patch_model(network(), anchor=0.1), network()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for step in range(2):
        (loss_of(model, step) + loss_of(other, step)).backward()
        for parameter in model.parameters():
            in_place(parameter)
        optimizer.step()
    with pytest.raises(SourceError, match=r"^anchor: expected a step of"):
        loss_of(model, 2)


def test_weights_loaded_between_steps_are_no_fault() -> None:
    model = patch_model(network(), anchor=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        model.load_state_dict(network(step).state_dict())
        loss_of(model, step).backward()
        optimizer.step()
    assert describe(model).anchored == 4


def test_weights_unfrozen_later_are_anchored_from_then_on() -> None:
    model = network()
    model[0].requires_grad_(False)
    patch_model(model, anchor=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    w_pre = model[0].weight.clone()
    for step in range(4):
        if step == 1:
            model[0].requires_grad_(True)
        loss_of(model, step).backward()
        before, grad = model[0].weight.detach().clone(), model[0].weight.grad
        optimizer.step()
        if grad is not None:
            expected = before - 0.1 * (before - w_pre) - 0.1 * grad
            torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-12, atol=1e-15)
        optimizer.zero_grad()
    assert stats(model)["mixed"] == 2


def test_anchored_model_may_be_frozen_as_a_whole() -> None:
    model = patch_model(network(), anchor=1.0).requires_grad_(False)
    model(data(0))
    assert stats(model)["steps"] == 1


def test_anchor_and_mixout_go_together() -> None:
    model = patch_model(network(), mixout=Mixout(0.5), anchor=Anchor(0.4))
    by_itself = patch_model(network(), mixout=Mixout(0.5))
    w_pre = by_itself[0].weight.detach().clone()
    trained = []
    for each, weight in ((model, 0.0), (by_itself, 0.4)):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for step in range(STEPS):
            loss_of(each, step).backward()
            with torch.no_grad():
                for index, start in ((0, w_pre), (2, network()[2].weight)):
                    each[index].weight.sub_(0.1 * weight * (each[index].weight - start))
            optimizer.step()
            optimizer.zero_grad()
        trained.append(each)
    assert_close(*trained)
    assert str(describe(model)).splitlines()[1] == (
        f"anchor       weight 0.4, in {STEPS} optimizer steps so far; "
        "set the optimizer's weight_decay for these weights to 0"
    )


def test_anchor_alone_draws_no_mask() -> None:
    model, plain = patch_model(network(), anchor=0.1), network()
    state = torch.random.get_rng_state()
    assert torch.equal(loss_of(model, 0), loss_of(plain, 0))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_anchored_model_is_collected() -> None:
    model = patch_model(network(), anchor=0.1)
    gone = weakref.ref(model)
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    del model
    gc.collect()
    assert gone() is None
    optimizer.step()


def test_optimizer_made_before_steps_on_after_unpatch() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with patched(model, anchor=1.0):
        loss_of(model, 0).backward()
        optimizer.step()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before - 0.1 * model[0].weight.grad)


@pytest.mark.parametrize("zeroed", ["before", "within"])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "lbfgs", "own"])
def test_step_with_a_closure_is_anchored_from_the_first_on(kind: str, zeroed: str) -> None:
    model, expected = patch_model(network(), anchor=0.5), network()
    w_pre = {name: w.detach().clone() for name, w in expected.named_parameters() if w.dim() == 2}
    optimizers = [OPTIMIZERS[kind](each) for each in (model, expected)]

    def closure(each: nn.Module, optimizer: Any, step: int) -> torch.Tensor:
        if zeroed == "within":
            optimizer.zero_grad()
        loss = loss_of(each, step)
        loss.backward()
        return loss

    for step in range(STEPS):
        with torch.no_grad():
            for name, start in w_pre.items():
                w = expected.get_parameter(name)
                w.copy_(w - optimizers[1].param_groups[0]["lr"] * 0.5 * (w - start))
        for each, optimizer in zip((model, expected), optimizers, strict=True):
            if zeroed == "before":
                optimizer.zero_grad()
            optimizer.step(partial(closure, each, optimizer, step))
    assert describe(model).anchored == STEPS
    assert_close(model, expected)


def test_closure_by_name_and_weights_that_are_never_trained() -> None:
    model = patch_model(nn.ModuleList([network(), nn.Linear(3, 3), nn.Linear(3, 3)]), anchor=0.5)
    model[2].requires_grad_(False)
    before = deepcopy(model[1].state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step(closure=lambda: loss_of(model[0], 0).backward())
    assert describe(model).anchored == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[1].state_dict().items())


def test_optimizer_without_an_lr_is_refused() -> None:
    model = patch_model(network(), anchor=0.5)
    loss_of(model, 0).backward()
    message = (
        r"^anchor: expected an optimizer with an lr, got Adafactor with lr=None\. "
        r"Give it an lr: the decay is lr \* weight\.$"
    )
    with pytest.raises(SettingError, match=message):
        Adafactor(model.parameters()).step()


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), True, "0.1"], ids=str)
def test_anchor_out_of_range_is_refused(weight: Any) -> None:
    with pytest.raises(
        SettingError, match=r"^anchor: expected a weight of at least 0, got .*\. Give one such as 0\.01"
    ):
        patch_model(network(), anchor=weight)
