"""RecAdam on a GPU; what needs none of its own runs on the CPU as well."""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from surgery import RecAdam, SourceError, describe, patch_model, stats

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
anywhere = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
SETTINGS = RecAdam(gamma=20.0, k=1.0, t0=3)


def net(device: str, *, dtype: torch.dtype = torch.float32, size: int = 48) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.Tanh(), nn.Linear(size, 1)).to(device, dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    w = next(model.parameters())
    for step in steps:
        x = torch.randn(16, w.shape[1], generator=torch.Generator().manual_seed(step)).to(w)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach": lambda params: torch.optim.AdamW(params, 0.01, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, 0.01, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, 0.01, momentum=0.9),
}


@anywhere
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_float64_on_the_cpu(name: str, device: str) -> None:
    model, reference = (patch_model(net("cpu", dtype=torch.float64), recadam=SETTINGS) for _ in "ab")
    model.to(device)  # w_pre moves with the model
    for each in (model, reference):
        train(each, OPTIMIZERS[name](each.parameters()), range(6))
    for w, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(w.cpu(), expected, rtol=1e-9, atol=1e-11)
    assert stats(model)["distance"] == pytest.approx(stats(reference)["distance"], rel=1e-9)
    assert describe(model).recalled == 6


@anywhere
def test_lr_that_is_a_tensor_is_read(device: str) -> None:
    model, reference = (patch_model(net(device, dtype=torch.float64), recadam=SETTINGS) for _ in "ab")
    lr = torch.tensor(0.01, dtype=torch.float64, device=device)
    train(model, torch.optim.SGD(model.parameters(), lr, foreach=False), range(4))
    train(reference, torch.optim.SGD(reference.parameters(), 0.01), range(4))
    for w, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_step_in_a_cuda_graph_is_refused() -> None:
    model = patch_model(net("cuda"), recadam=SETTINGS)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, capturable=True)
    train(model, optimizer, range(2))
    for w in model.parameters():
        w.grad = torch.ones_like(w)
    with pytest.raises(SourceError, match="got one captured in a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("is_fused", [False, True], ids=["plain", "fused"])
def test_step_that_the_grad_scaler_skips_does_not_count(is_fused: bool) -> None:
    model = patch_model(net("cuda"), recadam=SETTINGS)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=is_fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    found = []
    for step in range(4):
        loss = model(torch.randn(16, 48, device="cuda")).square().mean() * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        before = [w.detach().clone() for w in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(any(not torch.equal(w, was) for w, was in zip(model.parameters(), before, strict=True)))
    assert found == [True, False, True, True]
    assert stats(model)["recadam_t"] == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
def test_old_weights_take_memory_only_while_they_are_recalled(is_late: bool) -> None:
    def peak(model: nn.Module) -> int:
        gc.collect()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        train(model, optimizer, range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        train(model, optimizer, range(2, 4))
        return torch.cuda.max_memory_allocated() - start

    size = 2048
    plain = peak(net("cuda", size=size))
    torch.cuda.empty_cache()
    model = patch_model(net("cuda", size=size), recadam=RecAdam(gamma=1.0, k=1.0, t0=0 if is_late else 1e9))
    if is_late:
        model.__dict__["_surgery_patch"].resume(1000)
    weights = sum(w.nbytes for w in model.parameters())
    over = peak(model) - plain
    assert (over < 0.05 * weights) if is_late else (0.9 * weights < over < 4 * weights)
