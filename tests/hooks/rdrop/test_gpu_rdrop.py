"""R-Drop on a GPU; what needs none of its own runs on the CPU as well."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from surgery import RDrop, patch_model, stats

SIZE, CLASSES, ROWS, STEPS = 64, 8, 32, 5
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
anywhere = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
passes = pytest.mark.parametrize("passes", ["two", "doubled"])


def run_on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_gpu:
        test = mark(test)
    return test


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(SIZE, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.CrossEntropyLoss()(self.head(self.body(x)), y)  # type: ignore[no-any-return]


def net(device: str, **settings: Any) -> Net:
    torch.manual_seed(0)
    return patch_model(Net().to(device), rdrop=RDrop(1.0, **settings))


def rows(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, SIZE, generator=generator)
    return x.to(device), torch.randint(CLASSES, (ROWS,), generator=generator).to(device)


def train(model: Net, forward: Callable[..., torch.Tensor] | None = None, *, dtype: Any = None) -> list[float]:
    """Train; float16 is scaled."""
    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=dtype == torch.float16)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = (model if forward is None else forward)(*rows(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@anywhere
@passes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_training_stays_near_float32(device: str, passes: Any, dtype: torch.dtype) -> None:
    exact, low = (net(device, passes=passes) for _ in range(2))
    assert train(low, dtype=dtype) == pytest.approx(train(exact), rel=0.03)
    # CUDA draws other dropout in another dtype
    assert stats(low)["kl_mean"] == pytest.approx(stats(exact)["kl_mean"], rel=0.05 if device == "cpu" else 0.3)


@anywhere
def test_step_follows_the_equation(device: str) -> None:
    model, (x, y) = net(device, passes="two"), rows(device)
    torch.manual_seed(3)
    loss = model(x, y)
    torch.manual_seed(3)
    log_p, log_q = (model.head(model.body(x)).double().log_softmax(-1) for _ in range(2))
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean() / 2
    expected = (F.nll_loss(log_p, y) + F.nll_loss(log_q, y)) / 2 + kl / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = (torch.autograd.grad(each, list(model.parameters())) for each in (loss, expected))
    for grad, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


@anywhere
def test_doubled_batch_is_two_passes_in_distribution(device: str) -> None:
    losses = []
    for how in ("two", "doubled"):
        model = net(device, passes=how)
        losses.append(torch.stack([model(*rows(device)).detach() for _ in range(400)]).double())
    two, doubled = losses
    error = ((two.var() + doubled.var()) / 400).sqrt()
    assert (two.mean() - doubled.mean()).abs() < 4 * error
    assert 0.7 < two.std() / doubled.std() < 1.4


@run_on_gpu
@passes
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_training_on_cuda_fires_at_every_step(passes: Any, mode: str) -> None:
    torch._dynamo.reset()
    eager, model = (net("cuda", passes=passes) for _ in range(2))
    assert train(model, torch.compile(model, mode=mode)) == pytest.approx(train(eager), rel=0.1)
    found = stats(model)
    assert found["rdrop_fired"] == STEPS
    assert found["kl_mean"] == pytest.approx(stats(eager)["kl_mean"], rel=0.3)


@run_on_gpu
@passes
def test_step_does_not_wait_for_the_device(passes: Any) -> None:
    model, (x, y) = net("cuda", passes=passes), rows("cuda")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(5):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            model(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert stats(model)["rdrop_fired"] == 5
