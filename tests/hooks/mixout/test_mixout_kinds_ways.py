"""Weights that are not called `weight`: undone, copied, interrupted, compiled, and what autograd keeps of them."""

import io
import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import seeded
import torch
from census import Census
from kinds import KINDS, Holder, Kind, build, draw, filled, gpt_oss, mixtral, routed
from torch import nn

from surgery import SourceError, describe, patch_model, unpatch_model
from surgery.hooks.marks import PATCH

P = 0.5
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


def train(model: nn.Module, kind: Kind, *, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(*kind.read()).sum().backward()
        optimizer.step()
    optimizer.zero_grad()


def is_whole(model: Holder, kind: Kind) -> bool:
    """Tell whether every attribute, and every tensor that an RNN's kernel reads, is the parameter itself."""
    for name, module in model.named_modules():
        for attribute, w in module._parameters.items():
            if getattr(module, attribute) is not w or attribute in vars(module):
                return False
        if isinstance(module, nn.RNNBase):
            flat = [module._parameters[attribute] for attribute in module._flat_weights_names]
            if any(one is not w for one, w in zip(module._flat_weights, flat, strict=True)):
                return False
            if module._weights_have_changed():
                return False
        assert name or kind.masks.keys() <= dict(model.named_parameters()).keys()
    return True


def weights(model: nn.Module) -> bytes:
    return b"".join(w.detach().numpy().tobytes() for w in model.state_dict().values())


# -- undone --------------------------------------------------------------------------------------------------------


@EVERY
def test_unpatched_model_is_what_it_was(kind: Kind) -> None:
    model = build(kind)
    before = seeded.fingerprint(model)
    patch_model(model, mixout=P)
    assert seeded.fingerprint(model) != before
    train(model, kind)
    assert is_whole(model, kind)
    trained, ids = weights(model), [id(w) for w in model.parameters()]
    unpatch_model(model)
    assert weights(model) == trained
    assert [id(w) for w in model.parameters()] == ids
    assert seeded.fingerprint(model)["modules"] == before["modules"]
    plain = build(kind)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(*kind.read()), plain(*kind.read()))


@EVERY
def test_deepcopy_goes_on_by_itself_and_pickle_without_w_pre(kind: Kind) -> None:
    model = patch_model(build(kind), mixout=P)
    train(model, kind)
    copied, kept = deepcopy(model), weights(model)
    train(copied, kind)
    assert weights(model) == kept
    train(model, kind)
    assert weights(copied) == weights(model) != kept
    assert is_whole(copied, kind)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with pytest.raises(SourceError, match="expected w_pre, got a model from a pickle"):
        train(loaded, kind)
    assert is_whole(unpatch_model(loaded), kind)
    with pytest.raises(SourceError, match="expected a layer of a patched model, got one that was copied"):
        Holder(deepcopy(model.layer))(*kind.read())


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@EVERY
def test_forward_that_ends_early_leaves_no_w_mix(
    kind: Kind, error: type[BaseException], copied: Callable[[Any], Any]
) -> None:
    model = patch_model(build(kind), mixout=P)
    with torch.no_grad():
        for w in model.parameters():
            w += 1

    def stop(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        raise error

    handle = model.layer.register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(*kind.read())
    handle.remove()
    assert is_whole(model, kind) is (error is ValueError)  # a KeyboardInterrupt runs no hooks
    plain = weights(model)
    copy = copied(model)
    assert weights(copy) == plain
    assert torch.equal(copy.eval()(*kind.read()), model.eval()(*kind.read()))
    assert is_whole(copy, kind)
    assert is_whole(model, kind)
    assert is_whole(unpatch_model(model), kind)


# -- compiled ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        "gru",
        "attention",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("cell", "experts of GPT-OSS", "xlnet")),
    ],
)
def test_compiled_layer_computes_with_w_pre_where_p_is_1(name: str) -> None:
    kind = KINDS[name]
    model = patch_model(build(kind), mixout=1.0)
    expected = build(kind)(*kind.read())
    with torch.no_grad():
        for mixed in kind.masks:
            model.get_parameter(mixed).add_(1)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(*kind.read()), expected)
    assert is_whole(model, kind)
    assert describe(model).uncalled == ()


class Headed(nn.Module):
    """An RNN between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(4, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])  # type: ignore[no-any-return]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_rnn_leaves_the_forward_of_its_model_to_the_compiler() -> None:
    model = patch_model(Headed(), mixout=P).train()
    torch.compile(model, backend="eager")(torch.ones(3, 2, 4)).sum().backward()
    forwards = model.__dict__[PATCH].forwards
    assert (forwards.eager, int(forwards.traced)) == (0, 1)
    assert describe(model).uncalled == ()


# -- memory --------------------------------------------------------------------------------------------------------

WIDE = {
    "attention": (lambda: nn.MultiheadAttention(64, 2, bias=False), lambda: (draw(1, 2, 64).float(),) * 3, False),
    "attention of other sizes": (
        lambda: nn.MultiheadAttention(64, 2, kdim=32, vdim=32, bias=False),
        lambda: (draw(1, 2, 64).float(), *draw(2, 1, 2, 32).float()),
        False,
    ),
    "cell": (lambda: nn.LSTMCell(64, 64), lambda: (draw(1, 64).float(),), False),
    "grouped experts": (
        lambda: mixtral("grouped_mm", hidden=64, inner=32),
        lambda: tuple(x.float() if x.is_floating_point() else x for x in routed(64)),
        False,
    ),
    "lstm": (lambda: nn.LSTM(64, 64), lambda: (draw(2, 1, 64).float(),), True),
}


@pytest.mark.parametrize(("make", "read", "is_kept"), WIDE.values(), ids=WIDE)
def test_w_mix_waits_for_the_backward_pass_in_an_rnn_alone(
    make: Callable[[], nn.Module], read: Callable[[], tuple[torch.Tensor, ...]], is_kept: bool
) -> None:
    model = patch_model(Holder(make().float()), mixout=P).train()
    size = sum(model.get_parameter(name).nbytes for name in describe(model).mixed)
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in read()]
    with Census() as census:
        y = model(*inputs)
        alive = census.alive()
        y.sum().backward()
    assert (alive > size) is is_kept
    assert alive < size / 2 or is_kept
    assert sum(made for _, made in census.made.values()) > size


class Counting(nn.GRU):
    """Counts how often its weights are joined, which on a GPU moves all of them to other memory."""

    count = 0

    def flatten_parameters(self) -> None:
        self.count += 1


def test_weights_of_an_rnn_are_not_joined_at_each_forward() -> None:
    model = patch_model(Holder(Counting(4, 5).double()), mixout=P).train()
    before = model.layer.count
    for _ in range(3):
        model(draw(3, 2, 4)).sum().backward()
    assert model.layer.count == before


def test_change_in_place_before_backward_raises() -> None:
    kind = KINDS["attention"]
    model = patch_model(build(kind), mixout=P)
    y = model(*kind.read()).sum()
    with torch.no_grad():
        model.layer.out_proj.weight.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# -- experts in models ---------------------------------------------------------------------------------------------


def test_frozen_experts_are_left_as_they_are() -> None:
    model = patch_model(Holder(filled(gpt_oss())), mixout=P).train()
    model.layer.gate_up_proj.requires_grad_(False)  # type: ignore[operator]
    assert describe(model).mixed == ("layer.down_proj",)
    model(*routed()).sum().backward()
    assert model.layer.gate_up_proj.grad is None
