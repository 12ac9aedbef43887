"""Weights that are not called `weight`: what holds of experts, RNNs or torch's attention alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from kinds import EXPERTS, HIDDEN, KINDS, Holder, Seen, build, loss, mixtral, routed
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from transformers import MixtralConfig, MixtralForCausalLM

from surgery import SourceError, describe, patch_model, unpatch_model
from surgery.hooks.weights.layers import mask_shape

P = 0.5
pytestmark = pytest.mark.usefixtures("one_thread")


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
