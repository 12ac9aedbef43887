"""When R-Drop takes part: in training forwards alone, and in every k-th step of the optimizers."""

from typing import Any

import pytest
import seeded
import torch
from heads import HEADS
from torch import nn

from surgery import RDrop, SourceError, patch_model, stats

pytestmark = pytest.mark.usefixtures("one_thread")


def bert(**rdrop: Any) -> Any:
    model = seeded.bert(num_labels=3).train()
    return patch_model(model, rdrop=RDrop(1.0, **rdrop)) if rdrop else model


BATCH = seeded.batch(4, labels=3)


def calls_of(model: Any) -> list[int]:
    """Count the calls of a layer from now on, in place."""
    calls: list[int] = []
    model.bert.embeddings.register_forward_hook(lambda *_: calls.append(1))
    return calls


# -- what is not training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference"])
@pytest.mark.parametrize("name", HEADS)
def test_other_forwards_are_untouched_to_the_bit(name: str, mode: str) -> None:
    head = HEADS[name]
    outputs = []
    for model in (head.model(), patch_model(head.model(), rdrop=1.0)):
        model.train(mode != "eval")
        context = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
        torch.manual_seed(1)
        with context():
            outputs.append((model(**head.batch), torch.get_rng_state()))
    (plain, state), (patched, state_after) = outputs
    assert type(patched) is type(plain)
    assert torch.equal(state, state_after)
    for value, expected in zip(patched.to_tuple(), plain.to_tuple(), strict=True):
        assert type(value) is type(expected)
        assert not isinstance(value, torch.Tensor) or torch.equal(value, expected)


@pytest.mark.parametrize("passes", ["two", "doubled"])
def test_other_forwards_cost_one_pass(passes: str) -> None:
    model = bert(passes=passes)
    calls = calls_of(model)
    with torch.no_grad():
        model(**BATCH)
    model.eval()(**BATCH)
    assert len(calls) == 2
    model.train()(**BATCH)
    assert len(calls) == (4 if passes == "two" else 3)
    assert stats(model)["rdrop_fired"] == 1


def test_gradients_in_eval_mode_are_those_of_the_plain_model() -> None:
    grads = []
    for model in (bert().eval(), bert(passes="two").eval()):
        model(**BATCH).loss.backward()
        grads.append({name: w.grad for name, w in model.named_parameters()})
    torch.testing.assert_close(*grads, rtol=0, atol=0)


# -- every k-th step -----------------------------------------------------------------------------------------------


def fired(model: Any, forwards: int, calls: list[int]) -> list[bool]:
    """Which of the forwards have made two passes."""
    made = []
    for _ in range(forwards):
        before = len(calls)
        model(**BATCH).loss.backward()
        made.append(len(calls) - before == 2)
    return made


def optimizer_of(model: nn.Module, kind: Any = torch.optim.SGD, **settings: Any) -> Any:
    return kind(model.parameters(), lr=1e-3, **settings)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_every_kth_step_fires_and_others_cost_one_pass(every: int, accumulated: int) -> None:
    model = bert(every=every, passes="two")
    calls, optimizer = calls_of(model), optimizer_of(model)
    for step in range(1, 8):
        expected = [step % every == 0] * accumulated
        assert fired(model, accumulated, calls) == expected
        optimizer.step()
        optimizer.zero_grad()


def test_steps_that_do_not_fire_are_those_of_the_plain_model_to_the_bit() -> None:
    losses = []
    for model in (bert(), bert(every=2)):
        torch.manual_seed(1)
        losses.append(model(**BATCH).loss)
    assert torch.equal(*losses)
    assert type(losses[1]) is torch.Tensor


def test_optimizers_that_step_together_make_one_step() -> None:
    model = bert(every=2, passes="two")
    calls = calls_of(model)
    optimizers = [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (model.bert, model.classifier)]
    for step in range(1, 5):
        assert fired(model, 1, calls) == [step % 2 == 0]
        for optimizer in optimizers:
            optimizer.step()


def test_optimizers_of_other_models_make_no_step() -> None:
    model, other = bert(every=2, passes="two"), bert()
    calls, optimizer = calls_of(model), optimizer_of(other)
    for _ in range(3):
        assert fired(model, 1, calls) == [False]
        other(**BATCH).loss.backward()
        optimizer.step()


def test_closures_of_lbfgs_are_of_one_step() -> None:
    model = bert(every=2, passes="two")
    calls, optimizer = calls_of(model), optimizer_of(model, torch.optim.LBFGS, max_iter=3)
    made: list[list[bool]] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        before = len(calls)
        loss: torch.Tensor = model(**BATCH).loss
        loss.backward()
        made[-1].append(len(calls) - before == 2)
        return loss

    for step in range(1, 5):
        made.append([])
        optimizer.step(closure)
        assert len(made[-1]) > 1
        assert set(made[-1]) == {step % 2 == 0}


def test_a_step_that_grad_scaler_skips_is_none() -> None:
    model = bert(every=2, passes="two")
    calls, optimizer, scaler = calls_of(model), optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    made = []
    for broken in (True, False, False, True, False):
        before = len(calls)
        scaler.scale(model(**BATCH).loss).backward()
        made.append(len(calls) - before == 2)
        if broken:
            model.classifier.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert made == [False, False, True, False, False]


def test_every_refuses_weights_that_change_without_a_torch_optimizer() -> None:
    model = bert(every=2)

    def train() -> None:
        for _ in range(4):
            model(**BATCH).loss.backward()
            with torch.no_grad():
                for w in model.parameters():
                    w.sub_(0 if w.grad is None else 1e-3 * w.grad)

    with pytest.raises(SourceError, match=r"^every: expected steps of a torch.optim.Optimizer to count, got weights"):
        train()


def test_a_step_without_a_forward_of_the_patched_model_is_refused() -> None:
    model = bert(every=1)
    optimizer = optimizer_of(model)
    model.forward(**BATCH).loss.backward()
    with pytest.raises(SourceError, match=r"^rdrop: expected a forward of the patched model in training mode before"):
        optimizer.step()


class Zeroing(torch.optim.SGD):
    """Clears the gradients as it ends."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.zero_grad()
        return loss


def test_steps_that_clear_their_gradients_are_counted() -> None:
    model = bert(every=2, passes="two")
    optimizer = Zeroing(model.parameters(), 0.01)
    for _ in range(4):
        model(**BATCH).loss.backward()
        optimizer.step()
    assert stats(model)["rdrop_fired"] == 2
