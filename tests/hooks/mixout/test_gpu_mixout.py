"""Mixout on a GPU; what needs none of its own runs on the CPU as well."""

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from surgery import Mixout, describe, patch_model, stats

P, SIZE, ROWS, STEPS = 0.5, 64, 16, 4
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
anywhere = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
granularities = pytest.mark.parametrize("granularity", ["neuron", "element"])
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GRADIENTS = TOLERANCES | {torch.float16: 0.05, torch.bfloat16: 0.1}  # some CPUs add up in these dtypes


def run_on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_gpu:
        test = mark(test)
    return test


def net(device: str, *, dtype: torch.dtype = torch.float32, depth: int = 3, size: int = SIZE) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(size, size), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).to(device, dtype)


def rows(device: str, *, dtype: torch.dtype = torch.float32, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, size, dtype=torch.float64, generator=generator).to(device, dtype)


def move(model: nn.Module) -> None:
    """Take every weight so far from w_pre that no rounding brings it back."""
    with torch.no_grad():
        for w in model.parameters():
            w.add_(0.5 + torch.rand_like(w))


def train(model: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[float]:
    """Train; each step's masks are those of its seed."""
    w = next(model.parameters())
    x, losses = rows(w.device.type, dtype=w.dtype, size=w.shape[1]), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = (model if forward is None else forward)(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(layer: nn.Linear, w_pre: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Compare W_mix, the output and the gradient of a layer without bias with the formula; return the mask."""
    w, tolerance = layer.weight.detach().double(), TOLERANCES[layer.weight.dtype]
    x = rows(w.device.type, dtype=layer.weight.dtype)
    layer.zero_grad()
    eye = torch.eye(SIZE, dtype=x.dtype, device=x.device)
    output = forward(torch.cat([x, eye]))  # below its output stands what its weight was
    output[:ROWS].square().sum().backward()
    w_mix = output[ROWS:].detach().T.double()
    m = (w_mix != w_pre.double()).double()
    torch.testing.assert_close(w_mix, w_pre.double() + (w - w_pre.double()) * m / (1 - P), rtol=tolerance, atol=1e-3)
    grad = 2 * (x.double() @ w_mix.T).T @ x.double() * m / (1 - P)
    error = (layer.weight.grad.double() - grad).norm() / grad.norm()
    assert error < GRADIENTS[layer.weight.dtype]
    return m


@anywhere
@granularities
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_step_follows_the_formula(device: str, granularity: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype, device=device)
    patch_model(layer, mixout=Mixout(P, granularity=granularity))
    w_pre = layer.weight.detach().clone()
    move(layer)
    masks = [compare(layer, w_pre, layer) for _ in range(3)]
    assert all(not torch.equal(one, other) for one, other in pairwise(masks))
    assert 0.2 < torch.stack(masks).mean() < 0.8
    assert all((mask[0] == mask).all() == (granularity == "neuron") for mask in masks)


@anywhere
@granularities
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed_training_has_the_same_losses(device: str, granularity: str, use_reentrant: bool) -> None:
    settings = Mixout(P, granularity=granularity)
    plain, recomputed = (patch_model(net(device, dtype=torch.float64), mixout=settings) for _ in range(2))

    def forward(x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = checkpoint(recomputed[:3], x.requires_grad_(), use_reentrant=use_reentrant)
        return recomputed[3:](hidden)

    assert train(plain, lambda x: plain[3:](plain[:3](x))) == pytest.approx(train(recomputed, forward), abs=1e-12)


@anywhere
@granularities
def test_autocast_training_stays_near_float32(device: str, granularity: str) -> None:
    settings = Mixout(P, granularity=granularity)
    exact, cast = (patch_model(net(device), mixout=settings) for _ in range(2))

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            output: torch.Tensor = cast(x)
        assert output.dtype == torch.bfloat16
        return output.float()

    assert train(cast, forward) == pytest.approx(train(exact), rel=0.05)
    assert stats(cast)["distance"] == pytest.approx(stats(exact)["distance"], rel=0.05)


@anywhere
@granularities
def test_scaled_float16_training_stays_near_float32(device: str, granularity: str) -> None:
    model = patch_model(net(device), mixout=Mixout(P, granularity=granularity))
    expected = train(patch_model(net(device), mixout=Mixout(P, granularity=granularity)))
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-3), torch.amp.GradScaler(device, init_scale=2.0**10)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        with torch.autocast(device, torch.float16):
            loss = model(rows(device)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=0.02)
    assert scaler.get_scale() == 2**10


@anywhere
def test_model_moved_after_patching_takes_w_pre_along(device: str) -> None:
    model = patch_model(net("cpu"), mixout=Mixout(P)).to(device)
    train(model)
    assert describe(model).w_pre_device.startswith(device)
    assert stats(model)["distance"] > 0


@anywhere
@granularities
def test_offloaded_w_pre_gives_the_same_bits(device: str, granularity: str) -> None:
    settings: dict[str, Any] = {"mixout": Mixout(P, granularity=granularity), "anchor": 0.01}
    beside = patch_model(net(device, depth=6), **settings)
    away = patch_model(net(device, depth=6), w_pre_device="cpu", **settings)
    assert train(away) == train(beside)
    for one, other in zip(away.parameters(), beside.parameters(), strict=True):
        assert torch.equal(one, other)
    assert describe(away).w_pre_device == "cpu"
    assert stats(away)["distance"] == stats(beside)["distance"]


@run_on_gpu
@granularities
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_step_on_cuda_follows_the_formula(granularity: str, mode: str) -> None:
    torch._dynamo.reset()
    layer = nn.Linear(SIZE, SIZE, bias=False, device="cuda")
    patch_model(layer, mixout=Mixout(P, granularity=granularity))
    w_pre = layer.weight.detach().clone()
    move(layer)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    masks = [compare(layer, w_pre, compiled) for _ in range(3)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        masks += [compare(layer, w_pre, compiled) for _ in range(3)]
    assert all(not torch.equal(one, other) for one, other in pairwise(masks))


@run_on_gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_model_compiled_after_moving_captures_cuda_graphs() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = patch_model(net("cpu"), mixout=Mixout(P)).cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    skips = []
    for _ in range(5):
        model.zero_grad()  # gradients are of the graph's own memory, which the next run writes to
        compiled(rows("cuda")).sum().backward()
        skips.append(counters["inductor"]["cudagraph_skips"])
    assert skips == skips[:1] * 5  # the first call moves w_pre
    assert stats(model)["steps"] == 5
    assert not model._surgery_patch.weights.tracked[0].values.is_cpu


@run_on_gpu
def test_offloaded_w_pre_is_pinned_and_fetched_one_ahead() -> None:
    model = patch_model(net("cuda", depth=6), mixout=Mixout(P), w_pre_device="cpu")
    train(model)
    sites = model._surgery_patch.weights.tracked
    assert all(site.values.is_pinned() for site in sites)
    torch.cuda.synchronize()
    model[0](rows("cuda"))
    ahead = sites[0].pretrained.offload._ahead
    assert ahead.pretrained is sites[1].pretrained
    torch.cuda.synchronize()
    assert torch.equal(ahead.values.cpu(), sites[1].values)


def peak(**settings: Any) -> tuple[int, int]:
    """Bytes at the peak of a few training steps of 24 layers of 4 MiB, and of w_pre."""
    gc.collect()  # a patched model goes with the garbage collector: its layers and their marks hold each other
    torch.cuda.empty_cache()
    model = net("cuda", depth=24, size=1024)
    w_pre_bytes = 0
    if settings:
        patch_model(model, **settings)
        w_pre_bytes = stats(model)["w_pre_bytes"]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    train(model)
    return torch.cuda.max_memory_allocated(), w_pre_bytes


@run_on_gpu
@granularities
def test_memory_on_cuda_is_w_pre_and_one_layer(granularity: str) -> None:
    plain, _ = peak()
    mixed, w_pre = peak(mixout=Mixout(P, granularity=granularity))
    layer = w_pre // 24
    assert w_pre == 24 * 4 * 2**20
    assert mixed - plain <= 1.1 * w_pre + layer


@run_on_gpu
@granularities
def test_offloaded_w_pre_takes_two_layers_on_cuda(granularity: str) -> None:
    beside, w_pre = peak(mixout=Mixout(P, granularity=granularity))
    away, _ = peak(mixout=Mixout(P, granularity=granularity), w_pre_device="cpu")
    layer = w_pre // 24
    assert away <= beside - w_pre + 3 * layer
