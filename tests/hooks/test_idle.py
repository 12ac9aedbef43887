"""A model that is trained in eval mode: Mixout does nothing, and says so."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import optimizer as torch_optimizer

from surgery import describe, patch_model, unpatch_model
from surgery.hooks import steps

WARNING = (
    "mixout: expected a forward in training mode before an optimizer's step, got none: nothing is mixed. "
    "Call model.train(): from_pretrained leaves a model in eval mode, and so does an evaluation."
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("copied", [lambda model: model, deepcopy], ids=["itself", "copy"])
def test_training_in_eval_mode_warns_once_and_is_described(
    copied: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = copied(patch_model(network()).eval())
    train(model, sgd(model))
    assert caplog.messages == [WARNING]
    line = "NOT MIXED    in 3 optimizer steps: no forward in training mode came before them"
    assert (describe(model).unmixed, line in str(describe(model)).splitlines()) == (3, True)
    train(model.train(), sgd(model))
    assert (describe(model).unmixed, caplog.messages) == (3, [WARNING])


@pytest.mark.parametrize("copied", [lambda model: model, deepcopy], ids=["itself", "copy"])
def test_eval_mode_left_on_is_warned_of_once_and_described(
    copied: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = patch_model(network())
    train(model, sgd(model))
    model = copied(model)
    optimizer = sgd(model)
    train(model, optimizer)
    assert caplog.messages == []
    train(model.eval(), optimizer)
    assert (caplog.messages, describe(model).unmixed) == ([WARNING], 3)
    train(model.train(), optimizer)
    assert (caplog.messages, describe(model).unmixed) == ([WARNING], 3)


def test_model_whose_weight_is_taken_away_does_not_disturb_others() -> None:
    model = patch_model(network()).eval()
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    of_another_model(model)
    unpatch_model(model)


def in_train_mode(model: nn.Module) -> None:
    train(model.train(), sgd(model))


def with_a_closure(model: nn.Module) -> None:
    sgd(model.train()).step(lambda: model(torch.ones(2, 4)).sum().backward())


def of_another_model(model: nn.Module) -> None:  # noqa: ARG001
    other = network()
    train(other, sgd(other))


def of_its_bias(model: Any) -> None:
    train(model, torch.optim.SGD([model[0].bias], lr=0.1))


@pytest.mark.parametrize(
    "act", [in_train_mode, with_a_closure, of_another_model, of_its_bias], ids=lambda act: act.__name__
)
def test_other_steps_say_nothing(act: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(network()).eval()
    act(model)
    assert (caplog.messages, describe(model).unmixed) == ([], 0)


@pytest.mark.parametrize("settings", [{"anchor": 0.1}, {"mixout": 0.0}], ids=str)
def test_without_masks_there_is_nothing_to_say(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    for model in (patch_model(network(), **settings).eval(), deepcopy(patch_model(network(), **settings)).eval()):
        train(model, sgd(model))
        assert (caplog.messages, describe(model).unmixed) == ([], 0)


@pytest.mark.usefixtures("alone")
def test_optimizers_are_left_alone_afterwards() -> None:
    model = patch_model(network())
    assert torch_optimizer._global_optimizer_post_hooks
    unpatch_model(model)
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not torch_optimizer._global_optimizer_post_hooks


def test_pickled_model_is_watched(caplog: pytest.LogCaptureFixture) -> None:
    model = pickle.loads(pickle.dumps(patch_model(network()).eval()))
    train(model, sgd(model))
    assert caplog.messages == [WARNING]


@pytest.mark.filterwarnings("ignore:.*jit.script_method:DeprecationWarning")  # torch's own, as it imports its compiler
def test_compiled_optimizer_step_works_meanwhile() -> None:
    model = patch_model(network()).eval()
    optimizer = sgd(model)
    model(torch.ones(2, 4)).sum().backward()
    before = model[0].weight.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    assert not torch.equal(model[0].weight, before)


class Stepping(nn.Module):
    """As Lightning has it: forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def compiled_whole(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


def compiled_layers(model: Any) -> Any:
    for layer in model.net:
        layer.compile(backend="aot_eager")
    return model


def compiled_outside(model: Any) -> Any:
    return torch.compile(model.net, backend="aot_eager")


@pytest.mark.filterwarnings("ignore:.*jit.script_method:DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("how", "missed"),
    [(compiled_whole, 3), (compiled_layers, 3), (compiled_outside, 0)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_steps_of_compiled_models_are_told_apart(
    how: Callable[[Any], Any], missed: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = patch_model(Stepping())
    compiled, optimizer = how(model), sgd(model)
    train(compiled, optimizer)
    assert describe(model).unmixed == 0
    model.eval()
    train(compiled, optimizer)
    assert (describe(model).unmixed, caplog.messages.count(WARNING)) == (missed, int(missed > 0))


class Listening:
    def __init__(self, number: int, heard: list[int]) -> None:
        self.number, self.heard = number, heard

    def before_step(self, optimizer: Any, *, is_closure: bool) -> None:  # noqa: ARG002
        self.heard.append(self.number)

    def after_step(self, optimizer: Any, *, is_closure: bool) -> None: ...


def test_who_came_first_is_told_of_a_step_first() -> None:
    """A run adds noise to weights before RecAdam notes what they are."""
    heard: list[int] = []
    listeners = [Listening(number, heard) for number in range(20)]
    for one in listeners:
        steps.watch(one)
    steps.watch(listeners[3])
    model = nn.Linear(2, 2)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for one in listeners:
        steps.forget(one)
    assert heard == list(range(20))
