"""R-Drop's undoing, its copies, what interrupts it, and several patched models in one script."""

import inspect
import io
import pickle
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import _get_current_function_mode_stack

from surgery import Mixout, RDrop, SourceError, describe, patch_model, patched, stats, unpatch_model

TWO = RDrop(1.0, passes="two")
SIZE, CLASSES = 6, 3
REAL_LOSS = nn.CrossEntropyLoss


class Net(nn.Module):
    """Raises `error` in the given pass of a forward, or when it makes its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Dropout(0.3))
        self.head = nn.Linear(SIZE, CLASSES)
        self.error: type[BaseException] | None = None
        self.fails_in = 0
        self.calls = 0

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        logits: torch.Tensor = self.head(self.body(x))
        if self.error is not None and self.calls == self.fails_in:
            raise self.error("stop")
        return logits if y is None else F.cross_entropy(logits, y)


def net(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = Net().double()
    return patch_model(model, **settings) if settings else model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, SIZE, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (5,), generator=generator)


def train(model: Any, *, steps: int = 3, optimizer: Any = None) -> list[float]:
    x, y = rows()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def is_clean() -> bool:
    return not _get_current_function_mode_stack() and nn.CrossEntropyLoss is REAL_LOSS


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Any:
    yield
    assert is_clean()


# -- undoing ------------------------------------------------------------------------------------------------------

SETTINGS = [{"rdrop": TWO}, {"rdrop": 1.0, "mixout": 0.5}, {"rdrop": 1.0, "mixout": 0.5, "anchor": 0.1}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["rdrop", "mixout", "all"])
@pytest.mark.parametrize("is_trained", [False, True], ids=["untrained", "trained"])
def test_unpatched_model_is_what_it_was(settings: Any, is_trained: bool) -> None:
    model = seeded.bert().train()
    before, signature = seeded.fingerprint(model), inspect.signature(model.forward)
    patch_model(model, **settings)
    assert inspect.signature(model.forward) == signature
    assert type(model) is type(seeded.bert())
    if is_trained:
        model(**seeded.batch()).loss.backward()
    unpatch_model(model)
    assert seeded.fingerprint(model) == before
    assert str(describe(model)) == "not patched"


@pytest.mark.parametrize("settings", SETTINGS, ids=["rdrop", "mixout", "all"])
def test_unpatched_model_trains_as_one_that_never_was(settings: Any) -> None:
    model = unpatch_model(net(**settings))
    assert train(model, steps=4) == train(net(), steps=4)


def test_optimizer_made_before_goes_on_after() -> None:
    model, plain = net(), net()
    optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (model, plain)]
    with patched(model, rdrop=TWO):
        train(model, optimizer=optimizers[0])
    state = deepcopy(optimizers[0].state_dict()), deepcopy(model.state_dict())
    plain.load_state_dict(state[1])
    optimizers[1].load_state_dict(state[0])
    assert train(model, optimizer=optimizers[0]) == train(plain, optimizer=optimizers[1])


def test_nested_patches_come_back_with_their_statistics() -> None:
    model = net(rdrop=RDrop(1.0, passes="two"))
    train(model)
    with patched(model, rdrop=RDrop(2.0, passes="two")):
        assert stats(model)["rdrop_fired"] == 0
        train(model, steps=1)
        assert describe(model).rdrop.alpha == 2
    assert describe(model).rdrop.alpha == 1
    assert stats(model)["rdrop_fired"] == 3
    train(model, steps=1)
    assert stats(model)["rdrop_fired"] == 4


def test_patching_again_replaces_and_keeps_w_pre() -> None:
    model = net(rdrop=TWO)
    patch_model(model, rdrop=TWO, mixout=0.5)
    w_pre = {name: value.clone() for name, value in seeded.w_pre_of(model).items()}
    train(model)
    patch_model(model, mixout=0.5)
    assert describe(model).rdrop is None
    assert "kl" not in stats(model)
    assert all(torch.equal(seeded.w_pre_of(model)[name], value) for name, value in w_pre.items())
    fired = net(rdrop=TWO)
    train(fired)
    assert stats(patch_model(fired, rdrop=TWO))["rdrop_fired"] == 0
    assert net(rdrop=TWO)(*rows()).ndim == 0


def test_patching_twice_fires_once() -> None:
    once, twice = net(rdrop=TWO), patch_model(net(rdrop=RDrop(9.0)), rdrop=TWO)
    assert train(twice) == train(once)


# -- interruptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_in", [1, 2], ids=["first pass", "second pass"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_training_goes_on_after_an_interrupted_forward(error: type[BaseException], fails_in: int) -> None:
    model, plain = net(rdrop=TWO), net(rdrop=TWO)
    model.error, model.fails_in = error, fails_in
    with pytest.raises(error):
        model(*rows())
    assert train(model) == train(plain)
    assert stats(model)["rdrop_fired"] == 3


def test_interrupted_forward_leaves_other_losses_alone() -> None:
    model, other = net(rdrop=TWO), net()
    expected = train(deepcopy(other))
    model.error, model.fails_in = KeyboardInterrupt, 2
    with pytest.raises(KeyboardInterrupt):
        model(*rows())
    assert train(other) == expected
    train(model, steps=1)


@pytest.mark.parametrize("settings", [{"rdrop": TWO}, {"rdrop": 1.0, "mixout": 0.5}], ids=["rdrop", "mixout"])
def test_unpatching_ends_an_interrupted_forward(settings: Any) -> None:
    model = net(**settings)
    model.error, model.fails_in = KeyboardInterrupt, 2
    with pytest.raises(KeyboardInterrupt):
        model(*rows())
    unpatch_model(model)
    assert is_clean()


def test_leaving_with_ends_an_interrupted_forward() -> None:
    model = net()
    model.error, model.fails_in = KeyboardInterrupt, 2
    with pytest.raises(KeyboardInterrupt), patched(model, rdrop=TWO):
        model(*rows())
    assert is_clean()


@pytest.mark.parametrize("hook", ["head", "root"])
def test_exceptions_of_hooks_close_the_forward(hook: str) -> None:
    model = net(rdrop=TWO)
    module = model.head if hook == "head" else model
    handle = module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(*rows())
    assert is_clean()
    handle.remove()
    assert train(model) == train(net(rdrop=TWO))


def test_exception_of_a_loss_closes_the_forward() -> None:
    model = net(rdrop=TWO)
    x, y = rows()
    with pytest.raises(Exception, match="labels: expected shape"):
        model(x, y[:3])
    assert is_clean()
    assert train(model) == train(net(rdrop=TWO))


# -- copies -------------------------------------------------------------------------------------------------------


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


copies = pytest.mark.parametrize("copied", [deepcopy, by_pickle, by_torch], ids=["deepcopy", "pickle", "torch.save"])


@copies
@pytest.mark.parametrize("steps", [0, 3], ids=["untrained", "trained"])
@pytest.mark.parametrize("mixout", [None, 0.5], ids=["rdrop", "mixout"])
def test_copy_fires_by_itself(copied: Callable[[Any], Any], mixout: float | None, steps: int) -> None:
    if mixout and copied is not deepcopy:
        pytest.skip("a pickle leaves w_pre behind, and Mixout says so")
    model = net(rdrop=TWO, mixout=mixout)
    train(model, steps=steps)
    copy = copied(model)
    assert describe(copy).rdrop == describe(model).rdrop
    assert train(copy) == train(model)
    assert stats(copy)["rdrop_fired"] == 3
    assert stats(model)["rdrop_fired"] == steps + 3
    unpatch_model(copy)
    assert describe(model).rdrop is not None


@copies
def test_copy_counts_its_own_steps(copied: Callable[[Any], Any]) -> None:
    model = net(rdrop=RDrop(1.0, every=2, passes="two"))
    train(model, steps=3)
    copy = copied(model)
    train(copy, steps=2)
    assert stats(copy)["rdrop_fired"] == 1
    train(model, steps=1)
    assert stats(model)["rdrop_fired"] == 2


def test_state_dict_and_save_pretrained_know_nothing_of_it(tmp_path: Path) -> None:
    model = patch_model(seeded.bert(), rdrop=1.0).train()
    model(**seeded.batch()).loss.backward()
    assert list(model.state_dict()) == list(seeded.bert().state_dict())
    again = seeded.reload(model, tmp_path)
    assert str(describe(again)) == "not patched"


# -- several models -----------------------------------------------------------------------------------------------


def test_losses_of_a_part_are_intercepted_within_the_whole_only() -> None:
    whole = nn.Sequential(net(), nn.Identity())
    patch_model(whole, rdrop=TWO)
    x, y = rows()
    F.cross_entropy(whole[0](x), y).backward()
    assert stats(whole)["rdrop_fired"] == 0
    with pytest.raises(SourceError, match="modules of one patched model"):
        patch_model(nn.Sequential(whole), rdrop=TWO)


def test_patched_part_reaches_a_loss_of_the_whole() -> None:
    part = net(rdrop=TWO)
    whole = nn.Sequential(part, nn.Linear(CLASSES, CLASSES).double())
    x, y = rows()
    F.cross_entropy(whole(x), y).backward()
    assert stats(part)["rdrop_fired"] == 1


class Pupil(nn.Module):
    """Calls a teacher, which is patched by itself, and keeps it out of its modules."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.body, self.teacher = net(), (teacher,)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.body(x, y), self.teacher[0](x, y)


def test_patched_model_that_calls_another_makes_both_losses() -> None:
    teacher = net(rdrop=RDrop(0.5, passes="two"))
    pupil = patch_model(Pupil(teacher), rdrop=TWO)
    losses = pupil(*rows())
    sum(losses).backward()
    assert stats(pupil)["rdrop_fired"] == 1
    assert stats(teacher)["rdrop_fired"] >= 1


def test_two_models_train_side_by_side() -> None:
    one, other = net(rdrop=TWO), net(rdrop=RDrop(3.0, passes="two"))
    expected = train(deepcopy(one), steps=1) + train(deepcopy(other), steps=1)
    x, y = rows()
    found = []
    for model in (one, other):
        torch.manual_seed(0)
        found.append(model(x, y))
    sum(found).backward()
    assert [loss.item() for loss in found] == expected


def test_frozen_teacher_of_a_patched_pupil_stays_as_it_is() -> None:
    pupil, teacher = net(rdrop=TWO), net().eval().requires_grad_(requires_grad=False)
    x, y = rows()
    logits = pupil(x)
    distance = F.cross_entropy(logits, teacher(x).softmax(-1))
    (F.cross_entropy(logits, y) + distance).backward()
    assert stats(pupil)["rdrop_fired"] == 1


class Recursive(Net):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, depth: int = 1) -> torch.Tensor:
        return self(self.body(x), y, depth=depth - 1) if depth else super().forward(x, y)


def test_model_that_calls_itself_makes_two_passes_in_all() -> None:
    torch.manual_seed(0)
    model = patch_model(Recursive().double(), rdrop=TWO)
    model(*rows()).backward()
    assert model.calls == 2
    assert stats(model)["rdrop_fired"] == 1


def test_threads_intercept_losses_of_their_own_model_only() -> None:
    models = [net(rdrop=RDrop(1.0, passes="two")) for _ in range(2)]
    barrier, errors = threading.Barrier(2), []

    def work(model: Any) -> None:
        try:
            x, y = rows()
            barrier.wait()
            for _ in range(50):
                model(x, y).backward()
            assert is_clean()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [stats(model)["rdrop_fired"] for model in models] == [50, 50]


def test_stats_have_the_keys_of_what_is_patched() -> None:
    common = ["steps", "mixed", "w_pre_bytes", "distance"]
    own = ["kl", "ce", "kl_mean", "ce_mean", "rdrop_fired"]
    assert list(stats(net(rdrop=TWO))) == common + own
    assert list(stats(net(rdrop=TWO, mixout=Mixout(0.5)))) == common + own
    assert list(stats(net(mixout=0.5))) == common
