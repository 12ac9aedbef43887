"""Mixout of W = W0 + s B A against the formula on the merged weight, in float64; and what is refused."""

import io
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import adapted
import peft
import pytest
import seeded
import torch
from adapted import CASES, LINEAR, Case, Spy, inputs, layer_of, trainable
from flat_zero import split
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from surgery import Mixout, SettingError, SourceError, describe, patch_model, patched, stats, unpatch_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:LoRA adapter added to ConvNd:UserWarning", "ignore:.* is deprecated and will be removed in v6:FutureWarning"
)
P = 0.5
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


def patch(case: Case = LINEAR, **settings: Any) -> Any:
    """A patched model that has left its start."""
    settings = settings or {"mixout": P}
    return adapted.train_away(patch_model(adapted.make(case), **settings))


# -- the formula -----------------------------------------------------------------------------------------------------


@EVERY
def test_layer_computes_with_mixout_of_the_merged_weight(case: Case) -> None:
    model = adapted.make(case)
    start = adapted.start_of(case, model)
    spy = Spy(adapted.train_away(patch_model(model, mixout=0.3)))
    for seed in range(4):
        torch.manual_seed(seed)
        got = model(inputs(case))
        w = adapted.mixed(case, layer_of(model), adapted.factors(model), start, spy.last, 0.3)
        torch.testing.assert_close(got, adapted.apply(case, layer_of(model), w, inputs(case)), rtol=1e-12, atol=1e-12)
    assert {float(m) for seen in spy.seen for one in seen.values() for m in one} == {0.0, 1.0}


@EVERY
def test_five_steps_are_those_of_a_loop_by_hand(case: Case) -> None:
    model = adapted.make(case)
    start = adapted.start_of(case, model)
    spy = Spy(patch_model(model, mixout=P))
    if not start:
        adapted.train_away(model)
    by_hand = adapted.factors(model)
    leaves = [w.requires_grad_() for pair in by_hand.values() for w in pair]
    optimizer = torch.optim.Adam(trainable(model), 0.05)
    optimizer_by_hand = torch.optim.Adam(leaves, 0.05)
    for step in range(5):
        x = inputs(case, seed=step)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer_by_hand.zero_grad()
        w = adapted.mixed(case, layer_of(model), by_hand, start, spy.last, P)
        adapted.apply(case, layer_of(model), w, x).square().mean().backward()
        optimizer_by_hand.step()
    assert len({tuple(seen["default"].tolist()) for seen in spy.seen}) > 1
    for name, pair in adapted.factors(model).items():
        for got, wanted in zip(pair, by_hand[name], strict=True):
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-9, atol=1e-12)


def test_mean_over_masks_is_the_merged_weight() -> None:
    model = patch(mixout=0.3)
    with torch.no_grad():
        mean = sum(model(inputs()) for _ in range(4000)) / 4000
        wanted = model.eval()(inputs())
    torch.testing.assert_close(mean, wanted, rtol=0, atol=0.1)
    assert not torch.allclose(mean, unpatch_model(model).base_model.model[0].base_layer(inputs()), atol=0.3)


@pytest.mark.parametrize("case", [LINEAR, CASES[7]], ids=str)
def test_p_1_is_w_pre_and_p_0_draws_nothing(case: Case) -> None:
    model = adapted.make(case)
    wanted = model(inputs(case)).detach()  # B is 0, or the base was moved: either way this is w_pre
    adapted.train_away(patch_model(model, mixout=1.0))
    torch.testing.assert_close(model(inputs(case)), wanted, rtol=1e-12, atol=1e-12)
    patch_model(model, mixout=0.0)
    state = torch.get_rng_state()
    got = model(inputs(case))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(got, unpatch_model(model)(inputs(case)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mask_of_each_dtype_scales_or_zeroes_whole_columns(dtype: torch.dtype) -> None:
    model = adapted.train_away(patch_model(adapted.make(dtype=dtype), mixout=0.75))
    a = layer_of(model).lora_A["default"]
    seen = []
    a.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    for _ in range(8):
        model(inputs().to(dtype))
    for shown in seen:
        m = (shown != 0).any(0)
        assert shown.dtype == dtype
        assert torch.equal(shown, torch.where(m, a.weight.detach() * 4, 0))
    assert len({tuple((one != 0).any(0).tolist()) for one in seen}) > 1


def test_masks_follow_the_seed_and_each_call_draws_its_own() -> None:
    model = patch()
    spy = Spy(model)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        for _ in range(6):
            model(inputs())
    first, again, other = (spy.seen[i : i + 6] for i in (0, 6, 12))
    bits = [[tuple(one["default"].tolist()) for one in calls] for calls in (first, again, other)]
    assert bits[0] == bits[1] != bits[2]
    assert len(set(bits[0])) > 1


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
@pytest.mark.parametrize("case", [LINEAR, CASES[6], CASES[7]], ids=str)
def test_checkpointed_forward_is_recomputed_with_its_masks(case: Case, reentrant: bool) -> None:
    model = patch(case)
    x = inputs(case).requires_grad_()
    grads = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        (forward(x).square().sum() + forward(2 * x).sum()).backward()
        assert x.grad is not None
        grads.append([x.grad, *(w.grad.clone() for w in trainable(model) if w.grad is not None)])
    assert len(grads[0]) == 1 + len(trainable(model))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)  # their sums are in another order
    assert describe(model).uncalled == ()


@pytest.mark.parametrize("case", [LINEAR, CASES[6], CASES[7]], ids=str)
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_steps_follow_the_formula_in_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    model = adapted.make(case)
    start = adapted.start_of(case, model)
    adapted.train_away(patch_model(model, mixout=P))
    layer = layer_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eye = torch.eye(6, dtype=torch.float64)
    of = adapted.factors(model)
    w, w_pre = (adapted.mixed(case, layer, one, {}, torch.ones(6), 0) for one in (of, start))
    shown = set()
    for _ in range(4):
        got = (compiled(eye) - layer.base_layer.bias).T
        m = (got - w_pre).abs().gt(1e-9).any(0).double()
        torch.testing.assert_close(got, w_pre + (w - w_pre) * m / (1 - P), rtol=1e-12, atol=1e-12)
        shown.add(tuple(m.tolist()))
        model.zero_grad()
        got.square().sum().backward()
        by_hand = {name: tuple(one.clone().requires_grad_() for one in pair) for name, pair in of.items()}
        adapted.mixed(case, layer, by_hand, start, m, P).square().sum().backward()
        for name, (a, b) in by_hand.items():
            torch.testing.assert_close(layer.lora_A[name].weight.grad, a.grad, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(layer.lora_B[name].weight.grad, b.grad, rtol=1e-12, atol=1e-12)
    assert len(shown) > 1
    assert stats(model)["steps"] == 4
    assert describe(model).uncalled == ()
    torch._dynamo.reset()


# -- what stays as it is ----------------------------------------------------------------------------------------------


@EVERY
def test_unpatched_model_is_what_it_was(case: Case) -> None:
    model = adapted.make(case, lora_dropout=0.25)
    before = seeded.fingerprint(model)
    state = {name: w.clone() for name, w in model.state_dict().items()}
    patch_model(model, mixout=P)
    model(inputs(case)).sum().backward()
    assert list(model.state_dict()) == list(state)
    model.zero_grad()
    assert seeded.fingerprint(unpatch_model(model)) == before


def test_eval_is_untouched_to_the_bit() -> None:
    model = patch()
    plain = deepcopy(unpatch_model(deepcopy(model))).eval()
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(inputs()), plain(inputs()))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_before_a_mixed_adapter_is_replaced_and_restored() -> None:
    model = adapted.make(lora_dropout=0.25)
    dropout = layer_of(model).lora_dropout["default"]
    with patched(model, mixout=P):
        assert dropout.p == 0
        assert describe(model).replaced == ("base_model.model.0.lora_dropout.default",)
    assert dropout.p == 0.25
    with patched(model, mixout=Mixout(P, replace_dropout=False)):
        assert dropout.p == 0.25
    with patched(model, mixout=0.0):
        assert dropout.p == 0


@pytest.mark.parametrize("case", [LINEAR, CASES[7]], ids=str)
def test_deepcopy_goes_on_by_itself(case: Case) -> None:
    model = patch(case)
    copied = deepcopy(model)
    outputs = []
    for one in (model, copied):
        torch.manual_seed(0)
        outputs.append(one(inputs()).detach())
    assert torch.equal(*outputs)
    unpatch_model(model)
    assert describe(copied).mixed == ("base_model.model.0.base_layer.weight",)
    torch.manual_seed(0)
    assert torch.equal(copied(inputs()), outputs[0])


def test_pickle_goes_on_where_nothing_was_kept_and_says_so_where_it_was() -> None:
    for case, is_lost in ((LINEAR, False), (CASES[7], True)):
        model = patch(case)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert describe(loaded).is_w_pre_lost is is_lost
        if is_lost:
            with pytest.raises(SourceError, match="expected w_pre, got a model from a pickle"):
                loaded(inputs())
        else:
            torch.manual_seed(0)
            got = loaded(inputs())
            torch.manual_seed(0)
            assert torch.equal(got, model(inputs()))


def test_copy_of_a_part_is_refused_in_training() -> None:
    part = deepcopy(layer_of(patch()))
    with pytest.raises(SourceError, match=r"^base_model.model.0.base_layer.weight: expected a layer of a patched mode"):
        part(inputs())
    unpatch_model(part)(inputs())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("case", [LINEAR, CASES[7]], ids=str)
def test_interrupted_forward_leaves_nothing(case: Case, error: type[BaseException]) -> None:
    model = patch(case)
    layer = layer_of(model)

    def interrupt(*_: Any) -> None:
        raise error

    handle = layer.lora_B["default"].register_forward_hook(interrupt)
    with pytest.raises(error):
        model(inputs())
    handle.remove()
    copied = deepcopy(model)
    for one in (model, copied):
        unpatch_model(one)
        for factor in (layer_of(one).lora_A["default"], layer_of(one).lora_B["default"]):
            assert "weight" not in vars(factor)
            assert isinstance(factor.weight, nn.Parameter)
    assert torch.equal(model(inputs()), copied(inputs()))


# -- what is kept, and what is said -----------------------------------------------------------------------------------


def test_nothing_is_kept_but_a_start_that_was_taken_out_of_the_base() -> None:
    assert stats(patch())["w_pre_bytes"] == 0
    model = patch(CASES[7])
    assert stats(model)["w_pre_bytes"] == sum(w.nbytes for w in trainable(model))
    assert describe(model).w_pre_device == "cpu"


@EVERY
def test_distance_is_that_of_the_merged_weight(case: Case) -> None:
    model = adapted.make(case)
    start = adapted.start_of(case, model)
    patch_model(model, mixout=P)
    assert stats(model)["distance"] == 0
    adapted.train_away(model)
    layer = layer_of(model)
    wanted = adapted.delta(case, layer, adapted.factors(model)) - (adapted.delta(case, layer, start) if start else 0)
    assert stats(model)["distance"] == pytest.approx(float(wanted.norm()), rel=1e-12)


def test_patched_again_keeps_the_start() -> None:
    model = patch(CASES[7])
    distance = stats(model)["distance"]
    patch_model(model, mixout=0.25)
    assert stats(model)["distance"] == distance > 0
    patch_model(unpatch_model(model), mixout=P)
    assert stats(model)["distance"] == 0


def test_description_names_the_weights_and_says_that_lora_trains_them() -> None:
    model = patch(CASES[6])
    text = str(describe(model))
    name = "base_model.model.0.base_layer.weight"
    assert f"mixed        1 weights, 55 of 90 elements: {name}\n" in text
    assert f"\n             1 by LoRA, which keeps them frozen: {name}\n" in text
    assert "w_pre        the model's weights when it was patched; no copy, for they are frozen" in text
    left = describe(model).left or {}
    assert set(left) == {"base_model.model.0.base_layer.bias"}
    layer_of(model).base_layer.requires_grad_(True)
    assert set(describe(model).left or {}) == {n for n, _ in model.named_parameters() if "lora" in n or "bias" in n}


def test_trained_share_is_that_of_the_factors() -> None:
    model = patch()
    (regularizer,) = model.__dict__["_surgery_patch"].regularizers
    assert regularizer.logs(model) == {"mixed_share": 1.0}
    assert regularizer.report() == {"mixed": 1}
    assert not regularizer.has_acted
    model(inputs()).sum().backward()
    assert regularizer.has_acted


def test_layer_that_no_forward_calls_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = get_peft_model(Half(), LoraConfig(r=2, target_modules=["used", "unused"])).train()
    patch_model(model, mixout=P)
    model(torch.randn(2, 6)).sum().backward()
    assert describe(model).uncalled == ("base_model.model.unused.base_layer.weight",)
    (regularizer,) = model.__dict__["_surgery_patch"].regularizers
    assert regularizer.report() == {"mixed": 1}


# -- adapters that are switched, merged, added --------------------------------------------------------------------


def test_disabled_adapters_leave_the_base_and_are_no_mixing() -> None:
    model = patch()
    layer = layer_of(model)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), layer.base_layer(inputs()))
        assert describe(model).mixed == ()
    (regularizer,) = model.__dict__["_surgery_patch"].regularizers
    assert not regularizer.has_acted
    model(inputs()).sum().backward()
    assert regularizer.has_acted


def test_only_active_adapters_are_mixed() -> None:
    case = CASES[6]
    model = patch(case)
    spy = Spy(model)
    model.base_model.set_adapter("other0")
    got = model(inputs())
    assert list(spy.seen[-1]) == ["other0"]
    layer = layer_of(model)
    of = {"other0": adapted.factors(model)["other0"]}
    w = adapted.mixed(case, layer, of, {}, spy.last, P)
    torch.testing.assert_close(got, adapted.apply(case, layer, w, inputs()), rtol=1e-12, atol=1e-12)


MERGED = (
    r"^base_model\.model\.0: expected adapters beside their base, got 'default' merged into it, where nothing "
    r"regularizes it\. Call unmerge_adapter before training\.$"
)


def test_merged_adapter_is_refused_before_and_after_patching() -> None:
    model = patch()
    model.merge_adapter()
    with pytest.raises(SourceError, match=MERGED):
        model(inputs())
    with torch.no_grad():
        model(inputs())
    model.unmerge_adapter()
    model(inputs())
    unpatch_model(model).merge_adapter()
    before = seeded.fingerprint(model)
    with pytest.raises(SourceError, match=MERGED):
        patch_model(model, mixout=P)
    assert seeded.fingerprint(model) == before


def test_adapter_added_since_is_refused() -> None:
    model = patch()
    model.add_adapter("late", LoraConfig(r=2, target_modules=["0"]))
    model(inputs())
    model.set_adapter("late")
    message = "expected the adapters that patch_model has seen, got 'late', which was added since. Call patch_model"
    with pytest.raises(SourceError, match=message):
        model(inputs())
    patch_model(model, mixout=P)
    model(inputs())


def test_scaling_may_change() -> None:
    for case in (LINEAR, CASES[7]):
        model = adapted.make(case)
        start = adapted.start_of(case, model)
        spy = Spy(adapted.train_away(patch_model(model, mixout=P)))
        layer = layer_of(model)
        pre = adapted.base_weight(case, layer) + (adapted.delta(case, layer, start) if start else 0)
        layer.scale_layer(3.0)
        got = model(inputs())
        w = adapted.base_weight(case, layer) + adapted.delta(case, layer, adapted.factors(model))
        wanted = adapted.apply(case, layer, pre + (w - pre) * spy.last / (1 - P), inputs())
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"granularity": "element"},
            r"^granularity: expected neuron for LoRA \(base_model.*W0 \+ s \(B A\) \* m / \(1",
        ),
        ({"gradient": "official"}, r"^gradient: expected exact for LoRA \(base_model.*, got official"),
    ],
    ids=["element", "official"],
)
def test_settings_that_need_the_whole_weight_are_refused(settings: dict[str, Any], message: str) -> None:
    model = adapted.make()
    before = seeded.fingerprint(model)
    with pytest.raises(SettingError, match=message):
        patch_model(model, mixout=Mixout(P, **settings))
    assert seeded.fingerprint(model) == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=2, target_modules=["0"], use_dora=True), r"DoRA: its norm \|\|W0 \+ s B A\|\| is of the whole"),
        (LoraConfig(r=2, target_modules=["1"]), r"LoRA of Embedding, which is not mixed"),
        (LoraConfig(r=2, target_modules=["2"]), r"LoRA of MultiheadAttention, which is not"),
        (LoraConfig(r=2, target_modules=["3"]), r"LoRA of Conv3d, which is not"),
        (peft.IA3Config(target_modules=["0"], feedforward_modules=[]), "an adapter"),
        (peft.LoHaConfig(r=2, target_modules=["0"]), "an adapter"),
        (peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["0"]), "an adapter"),
    ],
    ids=["dora", "embedding", "attention", "conv3d", "ia3", "loha", "adalora"],
)
@pytest.mark.parametrize("method", ["mixout", "anchor"])
def test_other_adapters_are_refused_with_the_reason(config: Any, reason: str, method: str) -> None:
    layers = nn.Sequential(nn.Linear(6, 5), nn.Embedding(4, 3), nn.MultiheadAttention(4, 2), nn.Conv3d(2, 2, 1))
    model = get_peft_model(layers, config)
    before = seeded.fingerprint(model)
    with pytest.raises(SettingError, match=rf"PEFT's own: {reason}.*of adapters, W0 \+ s B A of plain LoRA alone is"):
        patch_model(model, **{method: 0.5})
    after = seeded.fingerprint(model)
    assert after["modules"] == before["modules"]
    assert after == before or "attention" in reason.lower()  # whose parameters PEFT makes anew when they are listed


def test_excluded_layer_is_left_alone() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), LoraConfig(r=2, target_modules=["0", "1"]))
    patch_model(model, mixout=P, exclude="base_model.model.1")
    assert describe(model).mixed == ("base_model.model.0.base_layer.weight",)
    assert {why for name, why in (describe(model).left or {}).items() if "model.1." in name} == {"in exclude"}
    with pytest.raises(SettingError, match="expected a trainable weight to mix, got none"):
        patch_model(model, mixout=P, exclude="**.lora_A")


def test_given_w_pre_must_be_the_base() -> None:
    model = adapted.make()
    state = {name: w.detach().clone() for name, w in model.named_parameters()}
    patch_model(model, mixout=P, w_pre=state)
    assert stats(model)["w_pre_bytes"] == 0
    unpatch_model(model)
    name = "base_model.model.0.base_layer.weight"
    message = rf"^w_pre: {name}: expected the frozen weight that LoRA is added to, got {{}}. Leave w_pre out"
    with pytest.raises(SourceError, match=message.format("other values")):
        patch_model(model, mixout=P, w_pre={**state, name: state[name] + 1})
    moved = adapted.make(CASES[7])
    with pytest.raises(SourceError, match=message.format("a base that is moved for the adapter 'default'")):
        patch_model(moved, mixout=P, w_pre={name: w.detach().clone() for name, w in moved.named_parameters()})


def test_nan_in_a_factor_is_refused() -> None:
    model = adapted.make()
    with torch.no_grad():
        layer_of(model).lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(SourceError, match=r"lora_A.default.weight: expected finite values, got NaN"):
        patch_model(model, mixout=P)


def test_lora_on_a_new_layer_is_new(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification.from_pretrained(seeded.bert_folder(tmp_path))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "classifier"]))
    patch_model(model, mixout=P)
    assert len(describe(model).mixed) == 2
    new = {name for name, why in (describe(model).left or {}).items() if why.startswith("new:")}
    assert {name for name in new if "lora_" in name} == {
        f"base_model.model.classifier.lora_{factor}.default.weight" for factor in "AB"
    }


# -- quantized bases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_on_a_quantized_base_is_mixed(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    layer = (
        bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
        if kind == "Linear4bit"
        else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    )
    model = nn.Sequential(layer).to("cpu")
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "Linear4bit", kind != "Linear4bit"
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"])).train()
    lora = layer_of(model)
    assert type(lora).__name__ == kind
    before = lora.base_layer.weight.detach().clone()
    patch_model(model, mixout=P)
    assert describe(model).mixed == ("base_model.model.0.base_layer.weight",)
    assert stats(model)["w_pre_bytes"] == 0
    with torch.no_grad():
        lora.lora_B["default"].weight.normal_()
    spy = Spy(model)
    x = torch.randn(3, 64)
    base = lora.base_layer(x).detach()
    a, b = adapted.factors(model)["default"]
    got = model(x)
    wanted = base + lora.scaling["default"] * (x * spy.last.float() / (1 - P)) @ a.T @ b.T
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert lora.lora_A["default"].weight.grad is not None
    assert torch.equal(lora.base_layer.weight, before)


def test_peft_is_not_imported_for_models_without_it() -> None:
    code = (
        "import sys, torch; from surgery import patch_model, describe; model = torch.nn.Linear(2, 2);"
        "str(describe(patch_model(model, mixout=0.5, anchor=0.1))); print('peft' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize("is_first", [True, False], ids=["patched-first", "split-first"])
def test_factors_that_zero_3_has_split_are_refused(is_first: bool) -> None:
    model: Any = adapted.make()
    if is_first:
        patch_model(model, mixout=P)
    for w in trainable(model):
        split(w, 0)
    message = r"^base_model\.model\.0: expected LoRA's factors whole, got some that ZeRO-3 has split\."
    with pytest.raises(SourceError, match=message):
        model.train()(inputs()) if is_first else patch_model(model, mixout=P)
