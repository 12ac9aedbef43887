"""Weights that are not called `weight`: attention's, RNNs', experts', XLNet's, against float64 loops by hand."""

from typing import Any

import pytest
import torch
from kinds import KINDS, OTHER_EXPERTS, Kind, Seen, build, loss
from torch import nn

from surgery import Mixout, describe, patch_model, perturb_model, stats

P, LR, STEPS = 0.5, 0.3, 5
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


def train(model: nn.Module, kind: Kind) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), LR / 10)
    for step in range(STEPS):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss(model(*kind.read())).backward()
        optimizer.step()
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def train_by_hand(kind: Kind, *, p: float = 0.0, anchor: float = 0.0) -> dict[str, torch.Tensor]:
    """Mixout, arXiv 1909.11299, or decay toward w_pre, by the formula alone."""
    weights = {name: w.detach().clone() for name, w in build(kind).named_parameters()}
    w_pre = {name: weights[name].clone() for name in kind.masks}
    for step in range(STEPS):
        torch.manual_seed(step)
        leaves = {name: w.requires_grad_() for name, w in weights.items()}
        mixed = dict(leaves)
        for name, shape in kind.masks.items() if p else ():
            m = torch.empty(shape, dtype=torch.float64).bernoulli_(1 - p)
            mixed[name] = w_pre[name] + (leaves[name] - w_pre[name]) * m / (1 - p)
        output = kind.plain({name.removeprefix("layer."): w for name, w in mixed.items()}, kind.read())
        slopes = torch.autograd.grad(loss(output), list(leaves.values()), allow_unused=True)
        for (name, w), slope in zip(leaves.items(), slopes, strict=True):
            decayed = w.detach() - LR / 10 * anchor * (w.detach() - w_pre[name]) if name in w_pre else w.detach()
            weights[name] = decayed - LR / 10 * slope if slope is not None else w.detach()
    return weights


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, w in wanted.items():
        torch.testing.assert_close(got[name], w, rtol=1e-11, atol=1e-12, msg=name)


# -- against loops by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS.values(), *OTHER_EXPERTS.values()], ids=[*KINDS, *OTHER_EXPERTS])
def test_training_has_the_parameters_of_the_loop_by_hand(kind: Kind) -> None:
    model = patch_model(build(kind), mixout=P)
    assert set(describe(model).mixed) == set(kind.masks)
    trained = train(model, kind)
    assert_close(trained, train_by_hand(kind, p=P))
    plain = train_by_hand(kind)
    assert all(not torch.allclose(trained[name], plain[name]) for name in kind.masks)
    assert describe(model).uncalled == ()
    assert stats(model)["mixed"] == len(kind.masks)


@EVERY
def test_anchor_decays_them_too(kind: Kind) -> None:
    assert_close(train(patch_model(build(kind), anchor=0.4), kind), train_by_hand(kind, anchor=0.4))


@EVERY
@pytest.mark.parametrize("gradient", ["exact", "official"])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_weights_and_gradients_are_those_of_the_formula(kind: Kind, granularity: Any, gradient: Any) -> None:
    model = build(kind)
    w_pre = {name: w.detach().clone() for name, w in model.named_parameters()}
    with torch.no_grad():
        for w in model.parameters():
            w += torch.rand_like(w) + 0.1
    patch_model(model, mixout=Mixout(P, granularity=granularity, gradient=gradient), w_pre=w_pre)
    seen = Seen(model, kind)
    loss(model(*kind.read())).backward()
    weights = {name.removeprefix("layer."): w.detach() for name, w in model.named_parameters()}
    leaves = {name: w.clone().requires_grad_() for name, w in (weights | seen.found[0]).items()}
    loss(kind.plain(leaves, kind.read())).backward()
    for name, shape in kind.masks.items():
        short, w, old = name.removeprefix("layer."), model.get_parameter(name), w_pre[name]
        m = (seen.found[0][short] != old).double()
        torch.testing.assert_close(seen.found[0][short], old + (w.detach() - old) * m / (1 - P), rtol=0, atol=1e-13)
        scale = 1 if gradient == "official" else 1 / (1 - P)
        torch.testing.assert_close(w.grad, leaves[short].grad * m * scale, rtol=1e-11, atol=1e-12)  # type: ignore[operator]
        narrow = m[tuple(slice(size if shape[axis] > 1 else 1) for axis, size in enumerate(m.shape))]
        assert torch.equal(m, narrow.expand_as(m)) is (granularity == "neuron")


# -- what else must hold -------------------------------------------------------------------------------------------


@EVERY
def test_eval_is_untouched_to_the_bit(kind: Kind) -> None:
    model, plain = patch_model(build(kind), mixout=P), build(kind)
    train(model, kind)
    plain.load_state_dict(model.state_dict())
    states = torch.get_rng_state()
    for has_grad in (True, False):  # nn.MultiheadAttention has another path without
        with torch.set_grad_enabled(has_grad):
            assert torch.equal(model.eval()(*kind.read()), plain.eval()(*kind.read()))
    assert torch.equal(torch.get_rng_state(), states)


@EVERY
def test_globs_name_single_weights(kind: Kind) -> None:
    first, *others = kind.masks
    for settings in ({"include": first}, {"exclude": others}) if others else ():
        assert describe(patch_model(build(kind), mixout=P, **settings)).mixed == (first,)


@EVERY
def test_other_methods_act_on_them_by_their_names(kind: Kind) -> None:
    model = patch_model(build(kind), recadam=20.0)
    assert kind.masks.keys() <= set(describe(model).acted["parameters"].names)
    model = build(kind)
    before = {name: model.get_parameter(name).detach().clone() for name in kind.masks}
    perturb_model(model, lam=0.15, seed=0)
    assert all(not torch.equal(model.get_parameter(name), w) for name, w in before.items())


@EVERY
def test_recomputed_forward_has_the_masks_of_the_first(kind: Kind) -> None:
    model = patch_model(build(kind), mixout=P)
    train(model, kind)
    found = []
    for is_again in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        args = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in kind.read()]
        again = torch.utils.checkpoint.checkpoint(model.layer, *args, use_reentrant=False) if is_again else None
        loss(model(*args) if again is None else again if isinstance(again, torch.Tensor) else again[0]).backward()
        found.append({name: model.get_parameter(name).grad for name in kind.masks})
    assert all(torch.equal(found[0][name], found[1][name]) for name in kind.masks)  # type: ignore[arg-type]
