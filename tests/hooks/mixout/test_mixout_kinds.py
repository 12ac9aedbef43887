"""Weights that are not called `weight`: attention's, RNNs', experts', XLNet's, against float64 loops by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from kinds import EXPERTS, HIDDEN, KINDS, OTHER_EXPERTS, Holder, Kind, build, mixtral, routed
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from transformers import MixtralConfig, MixtralForCausalLM

from surgery import Mixout, SourceError, describe, patch_model, perturb_model, stats, unpatch_model
from surgery.hooks.weights.layers import mask_shape

P, LR, STEPS = 0.5, 0.3, 5
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


def loss(output: torch.Tensor) -> torch.Tensor:
    return (output + 1).square().sum()


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


class Seen:
    """The weights that each call of the layer computes with."""

    def __init__(self, model: Holder, kind: Kind) -> None:
        self.found: list[dict[str, torch.Tensor]] = []
        self._names = [name.removeprefix("layer.") for name in kind.masks]
        model.layer.register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, _: Any) -> None:
        parts = {name: name.rpartition(".") for name in self._names}
        seen = {name: getattr(layer.get_submodule(path), last) for name, (path, _, last) in parts.items()}
        self.found.append({name: w.detach().clone() for name, w in seen.items()})


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


# -- single kinds --------------------------------------------------------------------------------------------------


def test_grouped_experts_have_the_gradients_of_single_ones() -> None:
    x, index, share = routed(8)
    found = []
    for way in ("eager", "grouped_mm"):
        torch.manual_seed(0)
        model = patch_model(Holder(mixtral(way, hidden=8).float()), mixout=P).train()  # its kernel takes no float64
        with torch.no_grad():
            for w in model.parameters():
                w += torch.randn_like(w)
        loss(model(x.float(), index, share.float())).backward()
        found.append([w.grad for w in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_each_expert_has_features_of_its_own() -> None:
    kind = KINDS["experts"]
    model = patch_model(build(kind), mixout=P)
    with torch.no_grad():
        model.layer.gate_up_proj += 1  # type: ignore[operator]
    seen = Seen(model, kind)
    w_pre = model.layer.gate_up_proj.detach() - 1  # type: ignore[operator]
    model(*kind.read())
    masks = ((seen.found[0]["gate_up_proj"] - w_pre).abs() > 0.5)[:, 0]
    assert masks.shape == (EXPERTS, HIDDEN)
    assert len({tuple(row) for row in masks.tolist()}) > 1


class Reused(nn.Module):
    """A layer that is called twice, and an RNN beside it that has the weight of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(4, 4).double(), nn.GRU(4, 4).double()
        self.second.weight_hh_l0 = self.first.weight_hh_l0
        self.first.weight_ih_l0 = self.first.weight_hh_l0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)[0])[0]  # type: ignore[no-any-return]


def test_tied_weights_share_a_mask_under_any_name() -> None:
    torch.manual_seed(0)
    model = patch_model(Reused(), mixout=P).train()
    assert describe(model).mixed == ("first.weight_ih_l0", "second.weight_ih_l0")
    assert describe(model).tied == ("first.weight_hh_l0", "second.weight_hh_l0")
    with torch.no_grad():
        model.first.weight_hh_l0 += 1
    seen: list[torch.Tensor] = []
    for layer in (model.first, model.second):
        layer.register_forward_pre_hook(lambda module, _: seen.extend(w.detach().clone() for w in module._flat_weights))
    model(torch.randn(3, 2, 4).double()).sum().backward()
    shared = [seen[0], seen[1], seen[5]]
    assert all(torch.equal(shared[0], w) for w in shared)
    assert not torch.equal(shared[0], model.first.weight_hh_l0)
    assert describe(unpatch_model(model)).uncalled_ties == ()


def test_fast_path_of_torch_computes_what_the_slow_one_does() -> None:
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)
    with torch.no_grad():
        plain = layer.eval()(x)
    patch_model(layer, mixout=P).train()(x).sum().backward()
    assert describe(layer).uncalled == ()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), plain)
        assert torch.equal(unpatch_model(layer)(x), plain)


def test_weights_are_read_by_functional_call_as_well() -> None:
    kind = KINDS["gru"]
    model = patch_model(build(kind), mixout=1.0)
    w_pre = {name: w.detach().clone() for name, w in model.named_parameters()}
    other = {name: w + 1 if name in kind.masks else w for name, w in w_pre.items()}
    leaves = {name: w.requires_grad_() for name, w in other.items()}
    output = functional_call(model, leaves, kind.read())
    torch.testing.assert_close(output, kind.plain({n.removeprefix("layer."): w for n, w in w_pre.items()}, kind.read()))


def test_weight_that_another_tool_drops_is_refused() -> None:
    model = build(KINDS["gru"])
    layer: Any = model.layer
    layer.weight_hh_l0_raw = nn.Parameter(layer.weight_hh_l0.detach())
    del layer.weight_hh_l0
    layer.__dict__["weight_hh_l0"] = layer.weight_hh_l0_raw * 1  # as weight drop does
    message = r"^layer.weight_hh_l0: expected the layer's own parameter, got one that another tool swaps in .*'layer'"
    with pytest.raises(SourceError, match=message):
        patch_model(model, mixout=P)


def test_weight_that_is_computed_is_named_and_the_others_are_mixed() -> None:
    model = build(KINDS["gru"])
    weight_norm(model.layer, "weight_hh_l0")
    described = describe(patch_model(model, mixout=P))
    assert described.mixed == ("layer.weight_ih_l0",)
    reasons = {why for name, why in (described.left or {}).items() if "parametrizations" in name}
    assert reasons == {"part of a weight that parametrize or weight_norm computes anew at each call"}
    loss(model(*KINDS["gru"].read())).backward()
    assert describe(model).uncalled == ()


def test_experts_of_which_there_are_none_are_no_fault() -> None:
    layer = KINDS["attention"].make()
    layer.register_parameter("in_proj_weight", None)  # as LongCat does where no expert is routed to
    assert describe(patch_model(Holder(layer), mixout=P)).mixed == ("layer.out_proj.weight",)


def test_experts_of_a_model_are_mixed_toward_a_state_dict_but_not_a_folder(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    model = MixtralForCausalLM.from_pretrained(tmp_path)
    experts = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    with pytest.raises(SourceError, match=rf"^w_pre: {experts[0]}: expected shape .*, got one that transformers makes"):
        patch_model(model, mixout=P, w_pre=tmp_path)
    patch_model(model, mixout=P, w_pre=model.state_dict()).train()
    assert set(experts) <= set(describe(model).mixed)
    ids = torch.randint(20, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    assert describe(model).uncalled == ()
    assert describe(patch_model(unpatch_model(model), w_pre=tmp_path, exclude="**.experts")).mixed


@pytest.mark.sweep
def test_masks_of_experts_are_of_what_each_matrix_reads() -> None:
    found = 0
    for model_type in zoo.model_types():
        _, model = next(zoo.build_all(model_type), ("", None))
        for module in model.modules() if isinstance(model, nn.Module) else ():
            down = module._parameters.get("down_proj")
            first = next(
                (name for name in ("gate_up_proj", "gate_proj", "up_proj") if name in module._parameters), None
            )
            if down is None or first is None:
                continue
            masks = [mask_shape(module, name) for name in (first, "down_proj")]
            hidden, inner = (max(mask[0][1:]) for mask in masks if mask is not None)
            assert sorted(down.shape[1:]) == sorted((hidden, inner)), model_type
            found += 1
    assert found > 40
