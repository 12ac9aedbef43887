"""R-Drop of hidden states, chunk by chunk, is R-Drop of the whole logits; and of fused heads as a script calls them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from surgery.hooks.rdrop import fused
from surgery.hooks.rdrop.divergence import cross_entropy
from surgery.hooks.rdrop.fused import Pass, Scaling, fused_rows, fused_sum
from surgery.hooks.rdrop.objective import Objective

pytestmark = pytest.mark.usefixtures("one_thread")
N, H, V = 7, 5, 11
SCALINGS = {
    "plain": Scaling(),
    "softcap": Scaling(softcap=1.5),
    "scale": Scaling(scale=0.4, temperature=0.7),
    "all": Scaling(scale=1.3, softcap=2.0, temperature=0.9),
}
HEADS = {"one head": (False, True), "two heads": (True, True), "no bias": (False, False)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens at once, so that there are full chunks and a rest."""
    monkeypatch.setattr(fused, "CPU_LOGITS", 3 * V)


def make_passes(*, has_two_heads: bool = False, has_bias: bool = True, dtype: Any = torch.float64) -> list[Pass]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    weight, bias = tensor(V, H), tensor(V) if has_bias else None
    other = (tensor(V, H), tensor(V) if has_bias else None) if has_two_heads else (weight, bias)
    return [Pass(tensor(N, H), weight, bias), Pass(tensor(N, H), *other)]


TARGET = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


def leaves(passes: list[Pass]) -> list[torch.Tensor]:
    tensors = [x for one in passes for x in (one.hidden, one.weight, one.bias) if x is not None]
    return list({id(x): x for x in tensors}.values())


def whole_logits(one: Pass, scaling: Scaling) -> torch.Tensor:
    z = F.linear(one.hidden, one.weight, one.bias) * scaling.scale
    z = z if scaling.softcap is None else scaling.softcap * torch.tanh(z / scaling.softcap)
    return z / scaling.temperature


def by_hand(passes: list[Pass], scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """The two cross entropies, and both directions of F.kl_div, of the whole logits."""
    a, b = (whole_logits(one, scaling) for one in passes)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    kls = [F.kl_div(x, y, reduction="none", log_target=True).sum(-1) for x, y in ((log_p, log_q), (log_q, log_p))]
    nll = (F.cross_entropy(a, TARGET, reduction="none") + F.cross_entropy(b, TARGET, reduction="none")) / 2
    return nll, (kls[0] + kls[1]) / 2


def assert_same(got: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_rows_and_their_gradients_are_those_of_the_whole_logits(scaling: Scaling, heads: Any) -> None:
    passes = make_passes(has_two_heads=heads[0], has_bias=heads[1])
    got, wanted = fused_rows(*passes, TARGET, scaling), by_hand(passes, scaling)
    assert_same(got, wanted)
    outer = [torch.linspace(-1, 2, N, dtype=torch.float64), torch.linspace(3, 0, N, dtype=torch.float64)]
    inputs = leaves(passes)
    assert_same(torch.autograd.grad(got, inputs, outer), torch.autograd.grad(wanted, inputs, outer))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_sum_and_its_gradients_are_those_of_the_whole_logits(scaling: Scaling, heads: Any) -> None:
    passes = make_passes(has_two_heads=heads[0], has_bias=heads[1])
    total, *rows = fused_sum(*passes, TARGET, scaling, 0.75)
    nll, s = by_hand(passes, scaling)
    assert_same([total, *rows], [(nll + 0.75 * s).sum(), nll, s])
    assert not any(row.requires_grad for row in rows)
    inputs = leaves(passes)
    assert_same(torch.autograd.grad(total * 3, inputs), torch.autograd.grad((nll + 0.75 * s).sum() * 3, inputs))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sum_is_the_unfused_loss(reduction: str) -> None:
    """The closed forms of both start from the same rows, so that this holds the objective together."""
    passes = make_passes()
    logits = [whole_logits(one, Scaling()) for one in passes]
    wanted = cross_entropy(*logits, TARGET, Objective(1.5), reduction=reduction).loss
    got = fused_sum(*passes, TARGET, Scaling(), 0.75)[0] / (N if reduction == "mean" else 1)
    assert_same([got], [wanted])
    inputs = leaves(passes)
    assert_same(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs))


@pytest.mark.parametrize("frozen", ["weight", "hidden", "bias"])
@pytest.mark.parametrize("function", [fused_rows, fused_sum])
def test_frozen_inputs_get_no_gradient(function: Any, frozen: str) -> None:
    passes = make_passes()
    for one in passes:
        getattr(one, frozen).requires_grad_(False)
    rest = () if function is fused_rows else (0.75,)
    function(*passes, TARGET, Scaling(), *rest)[0].sum().backward()
    assert all((x.grad is None) == (not x.requires_grad) for x in leaves(passes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_low_precision_is_near_float64(dtype: Any, is_autocast: bool) -> None:
    if dtype == torch.float32 and is_autocast:
        pytest.skip("autocast to float32 is no cast")
    given = torch.float32 if is_autocast else dtype
    passes = make_passes(dtype=given)
    exact = [
        Pass(*(x.detach().double().requires_grad_() for x in (one.hidden, one.weight, one.bias))) for one in passes
    ]
    exact[1] = Pass(exact[1].hidden, exact[0].weight, exact[0].bias)
    with torch.autocast("cpu", dtype if is_autocast else torch.bfloat16, enabled=is_autocast):
        got = fused_rows(*passes, TARGET, Scaling())
        total = fused_sum(*passes, TARGET, Scaling(), 0.75)[0]
    nll, s = by_hand(exact, Scaling())
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert all(x.dtype == torch.float32 for x in (*got, total))
    assert_same((x.double() for x in (*got, total)), (nll, s, (nll + 0.75 * s).sum()), tolerance)
    wanted = torch.autograd.grad((nll + 0.75 * s).sum(), leaves(exact))
    for loss in (total, (got[0] + 0.75 * got[1]).sum()):
        grads = torch.autograd.grad(loss, leaves(passes))
        assert {x.dtype for x in grads} == {given}
        assert_same((x.double() for x in grads), wanted, tolerance)


def test_no_tokens_have_no_loss_and_no_gradient() -> None:
    passes = [Pass(one.hidden[:0], one.weight, one.bias) for one in make_passes()]
    total, _, _ = fused_sum(*passes, TARGET[:0], Scaling(), 0.75)
    total.backward()
    assert total == 0
    assert passes[0].weight.grad is not None
    assert not passes[0].weight.grad.any()


def test_gradient_penalty_is_refused() -> None:
    passes = make_passes()
    for loss in (fused_rows(*passes, TARGET, Scaling())[0].sum(), fused_sum(*passes, TARGET, Scaling(), 0.75)[0]):
        with pytest.raises(RuntimeError, match=r"rdrop: expected create_graph=False, got True\."):
            torch.autograd.grad(loss, leaves(passes), create_graph=True)


# -- memory --------------------------------------------------------------------------------------------------------

STEP = """
import sys
from pathlib import Path
import torch
from surgery.hooks.rdrop.fused import Pass, Scaling, fused_rows, fused_sum

def held(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) // 1024

torch.set_num_threads(1)
way, tokens, words = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
hidden = [torch.randn(tokens, 64, requires_grad=True) for _ in range(2)]
weight, target = torch.randn(words, 64, requires_grad=True), torch.randint(words, (tokens,))
torch.randn(64, 64, requires_grad=True).square().sum().backward()  # what any first step allocates
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS:")
if way == "whole":
    loss = torch.nn.functional.cross_entropy(hidden[0] @ weight.t(), target)
else:
    passes = [Pass(one, weight) for one in hidden]
    if way == "rows":
        nll, s = fused_rows(*passes, target, Scaling())
        loss = (nll + 0.5 * s).mean()
    else:
        loss = fused_sum(*passes, target, Scaling(), 0.5)[0] / tokens
loss.backward()
print(held("VmHWM:") - before)
"""


def peak(way: str, tokens: int, words: int) -> int:
    """Return by how many MB a step raises the peak of a process of its own."""
    # else glibc keeps what is freed for another time
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STEP, way, str(tokens), str(words)]
    return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of a process")
@pytest.mark.parametrize(
    ("tokens", "words"), [(512, 32000), pytest.param(2048, 128256, marks=pytest.mark.sweep)], ids=["small", "Llama 3"]
)
@pytest.mark.parametrize("way", ["rows", pytest.param("sum", marks=pytest.mark.sweep)])
def test_two_passes_take_less_memory_than_cross_entropy_of_one(way: str, tokens: int, words: int) -> None:
    whole, fused = peak("whole", tokens, words), peak(way, tokens, words)
    print(f"{way}: {fused} MB, plain cross entropy of one pass: {whole} MB")
    logits = tokens * words * 4 / 2**20
    assert whole > 1.9 * logits  # the logits and their gradient
    # two chunks of logits, the head's gradient and its copy of the dtype
    assert fused < 2 * 64 + 3 * words * 64 * 4 / 2**20 + 64
    assert fused < whole
