"""A part of a patched model that was copied, pickled or kept without it: refused in training, and made plain again."""

import pickle
import threading
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from test_patch import IDS, bert, fingerprint, hooks, load, loss, saved
from torch import nn

from surgery import SourceError, describe, patch_model, unpatch_model

MESSAGE = (
    r"^{}: expected a layer of a patched model, got one that was copied or loaded without it\. "
    r"Call unpatch_model or patch_model on the model that it is in now\.$"
)
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda part: pickle.loads(pickle.dumps(part)),
    "save": lambda part: load(saved(part)),
}
COPY = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
QUERY = r"bert\.encoder\.layer\.0\.attention\.self\.query\.weight"


def shape_of(model: nn.Module) -> list[Any]:
    """All of a fingerprint that does not tell a model from its copy."""
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return [hooks(model), rates, [sorted(vars(module)) for module in model.modules()], saved(model)]


def eval_loss(model: nn.Module) -> torch.Tensor:
    model.eval()
    output = model(IDS)
    model.train()
    return output[0]


@COPY
def test_copy_of_a_part_is_refused_in_training(copied: Callable[[Any], Any]) -> None:
    model = patch_model(bert(), mixout=0.5)
    part = copied(model.bert)
    torch.testing.assert_close(eval_loss(part), eval_loss(model.bert))
    with pytest.raises(SourceError, match=MESSAGE.format(QUERY)):
        part(IDS)
    loss(model).backward()


@COPY
@pytest.mark.parametrize("settings", [{}, {"mixout": 0.0}, {"mixout": 0.5, "anchor": 0.1}], ids=["0.7", "0", "both"])
def test_unpatch_makes_a_copy_of_a_part_plain(copied: Callable[[Any], Any], settings: dict[str, Any]) -> None:
    expected = shape_of(copied(bert().bert))
    model = patch_model(bert(), **settings)
    part = copied(model.bert)
    patched_hooks = hooks(model)
    assert shape_of(unpatch_model(part)) == expected
    assert hooks(model) == patched_hooks
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}


@COPY
def test_copy_of_a_part_can_be_patched(copied: Callable[[Any], Any]) -> None:
    plain = shape_of(copied(bert().bert))
    part = patch_model(copied(patch_model(bert()).bert), mixout=0.5)
    part(IDS)
    assert (describe(part).mixout.p, hooks(part)) == (0.5, hooks(patch_model(bert().bert)))
    assert shape_of(unpatch_model(part)) == plain


def test_failed_patch_leaves_a_copy_of_a_part_as_it_is() -> None:
    part = deepcopy(patch_model(bert()).bert)
    before = fingerprint(part)
    with pytest.raises(SourceError, match="w_pre: expected names"):
        patch_model(part, w_pre={"x": torch.ones(1)})
    assert fingerprint(part) == before


def test_copied_layer_in_the_patched_model_itself() -> None:
    model = bert()
    layers = model.bert.encoder.layer
    layers.append(deepcopy(layers[0]))
    expected = shape_of(model)
    model = bert()
    layers = patch_model(model, mixout=0.5).bert.encoder.layer
    layers.append(deepcopy(layers[0]))
    with pytest.raises(SourceError, match=MESSAGE.format(QUERY)):
        loss(model)
    assert shape_of(unpatch_model(deepcopy(model)))[:3] == expected[:3]  # a copy shares strings in its own way
    with pytest.raises(SourceError, match=r"layer\.2\..*: expected w_pre from the former patch_model, got none"):
        patch_model(model)
    patch_model(model, exclude="bert.encoder.layer.2")
    loss(model).backward()
    assert shape_of(unpatch_model(model))[:3] == expected[:3]


def test_part_that_outlives_its_model_is_mixed_until_it_is_unpatched() -> None:
    expected = shape_of(bert().bert)
    part = patch_model(bert(), mixout=0.5).bert
    with torch.no_grad():
        part.encoder.layer[0].output.dense.weight += 1
    assert not torch.equal(part(IDS)[0], part(IDS)[0])
    assert shape_of(unpatch_model(part))[:3] == expected[:3]
    patch_model(part)


def test_part_of_a_patched_model_is_still_refused() -> None:
    model = patch_model(bert(), mixout=0.5)
    before = fingerprint(model)
    for change in (patch_model, unpatch_model):
        with pytest.raises(SourceError, match="expected modules of one patched model"):
            change(model.bert)
    unpatch_model(model.bert.embeddings)  # only its dropout has to do with the patch
    assert fingerprint(model) == before


def test_copies_of_a_whole_patched_model_are_patched_models() -> None:
    layer = patch_model(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1), mixout=0.5)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    unpatch_model(layer)
    encoder(torch.ones(3, 1, 8))
    for copied in encoder.layers:
        assert describe(copied).mixout.p == 0.5
        unpatch_model(copied)
    assert (hooks(encoder), encoder.layers[1].dropout.p) == (0, 0.1)


def test_interrupted_forward_leaves_a_copy_that_can_be_made_plain() -> None:
    model = patch_model(nn.Sequential(nn.Sequential(nn.Linear(3, 3))), mixout=0.5)
    model[0][0].__dict__["weight"] = model[0][0].weight.detach()  # as a KeyboardInterrupt leaves it
    part = deepcopy(model[0])
    assert unpatch_model(part)[0].weight is part[0]._parameters["weight"]


def test_frozen_copy_of_a_part_is_left_alone() -> None:
    teacher = deepcopy(patch_model(bert(), mixout=0.5).bert).requires_grad_(False).train()
    assert torch.equal(teacher(IDS)[0], teacher(IDS)[0])


def test_compiled_copy_of_a_part_is_refused_as_well() -> None:
    model = patch_model(nn.Sequential(nn.Sequential(nn.Linear(3, 3))), mixout=0.5)
    part = torch.compile(deepcopy(model[0]), backend="eager")
    with pytest.raises((SourceError, torch._dynamo.exc.TorchDynamoException), match="expected a layer of a patched"):
        part(torch.ones(1, 3))


class Stopped(nn.Linear):
    """Does something amid its forward."""

    stop: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        Stopped.stop()
        return nn.functional.linear(x, weight, self.bias)


def stopped() -> nn.Module:
    model = patch_model(nn.Sequential(Stopped(6, 6), nn.Linear(6, 2)), mixout=0.7).train()
    with torch.no_grad():
        model[0].weight += 1  # else it is w_pre, and so is W_mix
    return model


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("has_grad", [True, False])
@COPY
def test_no_copy_holds_what_an_interrupted_forward_has_left(
    copied: Callable[[Any], Any], has_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stopped()
    monkeypatch.setattr(Stopped, "stop", interrupt)
    with pytest.raises(KeyboardInterrupt), torch.set_grad_enabled(has_grad):
        model(torch.ones(2, 6))
    own = model[0]._parameters["weight"]
    assert not torch.equal(model[0].weight, own), "W_mix is there"
    copy = copied(model)[0]
    assert copy.weight is copy._parameters["weight"]
    assert torch.equal(copy.weight, own)


@COPY
def test_no_copy_by_another_thread_holds_w_mix(copied: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inside, copying = stopped(), threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert copying.wait(60)

    monkeypatch.setattr(Stopped, "stop", wait)
    training = threading.Thread(target=model, args=(torch.ones(2, 6),))
    training.start()
    assert inside.wait(60)
    own = model[0]._parameters["weight"]
    assert not torch.equal(model[0].weight, own), "W_mix is there"
    copy = copied(model)[0]
    copying.set()
    training.join()
    assert copy.weight is copy._parameters["weight"]
    assert torch.equal(copy.weight, own)


@pytest.mark.parametrize("settings", [{"mixout": 0.7}, {"rdrop": 1.0}], ids=["mixout", "rdrop"])
def test_second_thread_is_refused_and_the_first_goes_on(
    settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch_model(nn.Sequential(Stopped(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)), **settings).train()
    inside, going, found = threading.Event(), threading.Event(), []

    def wait() -> None:
        inside.set()
        assert going.wait(60)

    def train() -> None:
        loss = nn.functional.cross_entropy(model(torch.ones(2, 6)), torch.zeros(2, dtype=torch.long))
        loss.backward()
        found.append(loss)

    monkeypatch.setattr(Stopped, "stop", wait)
    first = threading.Thread(target=train)
    first.start()
    assert inside.wait(60)
    with pytest.raises(SourceError, match=r"^Sequential: expected one forward in training mode at a time, got one in "):
        model(torch.ones(2, 6))
    going.set()
    first.join()
    assert len(found) == 1
    train()
    assert len(found) == 2


@pytest.mark.parametrize("change", [unpatch_model, partial(patch_model, mixout=0.1)], ids=["unpatch", "patch"])
def test_a_patch_is_not_changed_amid_a_forward(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = stopped()
    monkeypatch.setattr(Stopped, "stop", lambda: change(model))
    with pytest.raises(
        SourceError, match=r"^Sequential: expected a model between its forwards, got one amid a forward"
    ):
        model(torch.ones(2, 6))
    monkeypatch.setattr(Stopped, "stop", lambda: None)
    model(torch.ones(2, 6))
    assert describe(unpatch_model(model)).settings == ()
