"""torch.compile of a patched model: one graph, fresh masks in every step, the loss and gradients of the formula."""

import re
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch.utils.checkpoint import checkpoint

from surgery import Mixout, SourceError, describe, patch_model, stats, unpatch_model

P, SIZE = 0.5, 8
pytestmark = [  # torch's own, of its compiler
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, and g++ is missing")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Seen(nn.Module):
    """Two layers without bias that also show what their weights were: each is handed the identity below its input."""

    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False)
        if is_tied:
            self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        eye = torch.eye(SIZE, dtype=x.dtype, device=x.device)
        hidden = self.first(torch.cat([x, eye]))
        output = self.second(torch.cat([hidden[: len(x)].tanh(), eye]))
        return output[: len(x)], hidden[len(x) :].T, output[len(x) :].T


def trained_away(*, is_tied: bool = False, dtype: torch.dtype = torch.float64, **settings: Any) -> Seen:
    """A patched model whose weights have left w_pre."""
    torch.manual_seed(0)
    model = patch_model(Seen(is_tied=is_tied).to(dtype), mixout=Mixout(P, **settings))
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn_like(w))
    return model


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(5, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(model: Seen, seen: tuple[torch.Tensor, ...], slope: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and dL/dW of the formula in float64, for the masks that the run's own W_mix show."""
    pretrained = [site.values.double() for site in model._surgery_patch.weights.tracked]
    layers = [model.first, model.second]
    mixed = []
    for layer, w_pre, shown in zip(layers, pretrained * (2 // len(pretrained)), seen[1:], strict=True):
        m = (shown.detach() != w_pre.to(shown.dtype)).double()
        w = layer.weight.detach().double()
        mixed.append((w_pre + (w - w_pre) * m / (1 - P), m))
    leaves = [w_mix.clone().requires_grad_() for w_mix, _ in mixed]
    loss = ((inputs() @ leaves[0].T).tanh() @ leaves[1].T).square().mean()
    grads = torch.autograd.grad(loss, leaves)
    return loss.detach(), [grad * m * slope for grad, (_, m) in zip(grads, mixed, strict=True)]


def compare(model: Seen, compiled: Callable[..., Any], *, slope: float, tolerance: float) -> tuple[torch.Tensor, ...]:
    """Run one step; compare its loss and gradients with the formula."""
    model.zero_grad()
    seen: tuple[torch.Tensor, ...] = compiled(inputs(model.first.weight.dtype))
    got = seen[0].square().mean()
    got.backward()
    loss, grads = expected(model, seen, slope)
    torch.testing.assert_close(got.detach().double(), loss, rtol=tolerance, atol=tolerance)
    if model.first.weight is model.second.weight:
        grads = [grads[0] + grads[1]]
    for w, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(w.grad.double(), grad, rtol=tolerance, atol=tolerance)
    return seen


@pytest.mark.parametrize("is_tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize(("gradient", "slope"), [("exact", 1 / (1 - P)), ("official", 1.0)], ids=["exact", "official"])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_compiled_steps_follow_the_formula_in_one_graph(
    granularity: str, gradient: str, slope: float, is_tied: bool
) -> None:
    model = trained_away(is_tied=is_tied, granularity=granularity, gradient=gradient)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    steps = [compare(model, compiled, slope=slope, tolerance=1e-12)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps += [compare(model, compiled, slope=slope, tolerance=1e-12) for _ in range(4)]
    assert all(not torch.equal(one[1], other[1]) for one, other in pairwise(steps))
    assert all(torch.equal(first, second) == is_tied for _, first, second in steps)
    columns = (steps[0][1] != model._surgery_patch.weights.tracked[0].values).double().mean(0)
    assert set(columns.tolist()) <= {0.0, 1.0} or granularity == "element"
    assert stats(compiled)["steps"] == stats(model)["steps"] == 5
    assert describe(compiled).uncalled == ()


@needs_compiler
def test_inductor_follows_the_formula() -> None:
    model = trained_away(granularity="element", dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    compare(model, compiled, slope=2, tolerance=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(model, compiled, slope=2, tolerance=1e-5)


def test_compiled_eval_is_the_identity() -> None:
    model = trained_away()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(inputs())
    compiled.eval()
    assert torch.equal(compiled(inputs())[1], model.first.weight)
    compiled.train()
    assert not torch.equal(compiled(inputs())[1], model.first.weight)
    assert stats(model)["steps"] == 2


def test_unpatched_after_compile_mixes_no_more() -> None:
    model = trained_away()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(inputs())
    unpatch_model(compiled)
    _, first, second = compiled(inputs())
    assert torch.equal(first, model.first.weight)
    assert torch.equal(second, model.second.weight)
    assert not any(name.startswith("_surgery") for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("fullgraph", [True, False])
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=True)  # as it is before the first patch
def test_compiled_models_of_one_class_do_not_share_graphs(fullgraph: bool) -> None:
    plain = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).double()
    compiled_plain = torch.compile(plain, fullgraph=fullgraph, backend="aot_eager")
    compiled_plain(inputs())
    model = deepcopy(plain)
    patch_model(model, mixout=P, w_pre={"0.weight": torch.zeros(SIZE, SIZE, dtype=torch.float64)})
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    for _ in range(3):
        assert not torch.equal(compiled(inputs()), compiled(inputs()))
        assert torch.equal(compiled_plain(inputs()), plain(inputs()))
    assert stats(model)["steps"] == 6
    patch_model(unpatch_model(model), mixout=Mixout(1), w_pre={"0.weight": torch.zeros_like(model[0].weight)})
    assert not compiled(inputs()).any()


def test_patched_again_after_compile_is_refused() -> None:
    model = trained_away()
    compiled = torch.compile(model, backend="aot_eager")
    message = "OptimizedModule: expected a model that is not compiled, got one that is: its hooks would never run"
    with pytest.raises(SourceError, match=message):
        patch_model(compiled)
    assert stats(model)["mixed"] == 2


def test_model_compile_in_place_mixes() -> None:
    model = trained_away()
    model.compile(fullgraph=True, backend="aot_eager")
    compare(model, model, slope=2, tolerance=1e-12)
    compare(model, model, slope=2, tolerance=1e-12)
    assert stats(model)["steps"] == 2
    unpatch_model(model)
    assert torch.equal(model(inputs())[1], model.first.weight)
    with pytest.raises(SourceError, match="Seen: expected a model that is not compiled"):
        patch_model(model)


@pytest.mark.parametrize("how", ["torch.compile", "compile"])
def test_compiled_layer_of_a_patched_model_mixes(how: str) -> None:
    model = trained_away()
    if how == "compile":
        model.second.compile(backend="aot_eager")
    else:
        model.second = torch.compile(model.second, fullgraph=True, backend="aot_eager")
    steps = [compare(model, model, slope=2, tolerance=1e-12) for _ in range(3)]
    assert all(not torch.equal(one[2], other[2]) for one, other in pairwise(steps))
    assert stats(model)["steps"] == 3
    assert describe(model).uncalled == ()
    unpatch_model(model)
    assert torch.equal(model(inputs())[2], model.second.weight)


@pytest.mark.parametrize("layers", [["first"], ["second"]], ids=str)
def test_tied_weight_of_which_one_layer_is_compiled_is_refused(layers: list[str]) -> None:
    model = trained_away(is_tied=True)
    for layer in layers:
        setattr(model, layer, torch.compile(getattr(model, layer), backend="aot_eager"))
    message = (
        "first.weight: expected one mask for all layers that share it, got some compiled and some not. "
        "Compile the whole model, or name the weight in exclude."
    )
    with pytest.raises(SourceError, match=f"^{re.escape(message)}$"):
        model(inputs())


def test_tied_layers_compiled_apart_share_their_mask() -> None:
    model = trained_away(is_tied=True)
    for layer in ("first", "second"):
        setattr(model, layer, torch.compile(getattr(model, layer), fullgraph=True, backend="aot_eager"))
    for _ in range(3):
        seen = compare(model, model, slope=2, tolerance=1e-12)
        assert torch.equal(seen[1], seen[2])


def test_compiled_weights_are_held_static() -> None:
    """What is not is copied by CUDA graphs (mode="reduce-overhead") in every step, w_pre too."""
    moving: list[int] = []

    def note(graph: Any, example: list[Any]) -> Any:
        def forward(inner: Any, values: list[Any]) -> Any:
            static = torch._guards.TracingContext.get().fw_metadata.static_input_indices
            moving.append(len(values) - len(static))
            return make_boxed_func(inner.forward)

        return aot_module_simplified(graph, example, forward, lambda inner, _: make_boxed_func(inner.forward))

    torch.compile(trained_away(), backend=note)(inputs())
    assert sum(moving) == 1  # x


class Broken(Seen):
    """A forward that torch.compile cannot take as one graph."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch._dynamo.graph_break()
        seen = super().forward(x)
        torch._dynamo.graph_break()
        return seen


@pytest.mark.parametrize("is_tied", [False, True], ids=["apart", "tied"])
def test_compiled_with_graph_breaks_follows_the_formula(is_tied: bool) -> None:
    model = trained_away(is_tied=is_tied)
    model.__class__ = Broken
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        seen = compare(model, compiled, slope=2, tolerance=1e-12)
        assert torch.equal(seen[1], seen[2]) == is_tied
    assert stats(model)["steps"] == 3


def test_compiled_forward_that_raises_leaves_parameters_in_place() -> None:
    model = trained_away()
    before = dict(model.named_parameters())
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(Exception, match="Sizes of tensors must match"):
        compiled(torch.zeros(3, SIZE + 1, dtype=torch.float64))
    compare(model, compiled, slope=2, tolerance=1e-12)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_compiled_after_a_cast_follows_the_formula() -> None:
    model = trained_away().float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compare(model, compiled, slope=2, tolerance=1e-5)
    assert {site.values.dtype for site in model._surgery_patch.weights.tracked} == {torch.float32}


class Blocks(nn.Module):
    """Layers that are recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Seen() for _ in range(2)])

    def forward(self, x: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        seen = []
        for block in self.blocks:
            seen.append(checkpoint(block, x, use_reentrant=False))
            x = seen[-1][0]
        return seen


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_compiled_checkpointing_recomputes_the_same_masks(granularity: str) -> None:
    torch.manual_seed(0)
    model = patch_model(Blocks().double(), mixout=Mixout(P, granularity=granularity))
    plain = unpatch_model(deepcopy(model))
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn_like(w))
    seen = torch.compile(model, backend="aot_eager")(inputs())
    seen[-1][0].square().mean().backward()
    leaves = [w_mix.detach().clone().requires_grad_() for block in seen for w_mix in block[1:]]
    x = inputs()
    for first, second in zip(leaves[::2], leaves[1::2], strict=True):
        x = (x @ first.T).tanh() @ second.T
    grads = torch.autograd.grad(x.square().mean(), leaves)
    for w, w_pre, w_mix, grad in zip(model.parameters(), plain.parameters(), leaves, grads, strict=True):
        torch.testing.assert_close(w.grad, grad * (w_mix != w_pre) / (1 - P), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:no checkpoint found")
def test_compiled_bert_trains_in_one_graph() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = patch_model(
        BertForSequenceClassification(BertConfig(vocab_size=100, **sizes)).train(), exclude="classifier"
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    losses = []
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            losses.append(nn.functional.cross_entropy(compiled(**batch).logits, torch.tensor([0, 1])))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len({loss.item() for loss in losses}) == 4
    assert stats(model)["steps"] == 4
    assert describe(compiled).uncalled == ()


def test_exported_eval_is_the_unpatched_model() -> None:
    model = trained_away().eval()
    exported = torch.export.export(model, (inputs(),)).module()
    assert torch.equal(exported(inputs())[0], unpatch_model(model)(inputs())[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_jit_traced_eval_is_the_unpatched_model() -> None:
    model = trained_away().eval()
    traced = torch.jit.trace(model, (inputs(),))
    assert torch.equal(traced(inputs())[0], unpatch_model(model)(inputs())[0])
