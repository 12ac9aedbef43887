"""The fused heads' own kernels on a GPU, beside the whole logits: R-Drop, and the figures that stay theirs."""

from importlib.util import find_spec
from typing import Any

import fused_heads
import pytest
import torch
from fused_heads import STAND_INS
from torch.nn import functional as F  # noqa: N812

from surgery import patch_model
from surgery.hooks.rdrop.fused import Pass, Scaling, fused_rows, fused_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),  # of the libraries
]
PACKAGES = {"trl": "trl", "liger": "liger_kernel", "cce": "cut_cross_entropy"}
N, H, V = 96, 64, 1000


class Net(torch.nn.Module):
    def __init__(self, name: str, own: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.dropout = torch.nn.Linear(H, H), torch.nn.Dropout(0.3)
        self.lm_head = torch.nn.Linear(H, V, bias=False)
        self.name, self.own = name, own

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        hidden, weight = self.dropout(self.body(x)), self.lm_head.weight
        if self.name == "trl":
            given = (weight, None, y, 1.0, 32768, None, 1.0, ("log_probs", "entropy", "is_top1"))
            log_probs, entropy, *_, right = self.own.apply(hidden, *given)
            return {"loss": -log_probs.mean(), "log_probs": log_probs, "entropy": entropy, "right": right}
        if self.name == "liger":
            options = (None, None, -100, 0.0, 0.0, "mean", None, False, None, False, True)
            loss, _, accuracy, _ = self.own.apply(hidden, weight, y, *options)
            return {"loss": loss, "accuracy": accuracy}
        from cut_cross_entropy import linear_cross_entropy

        return {"loss": linear_cross_entropy(hidden, weight, y)}


@pytest.mark.parametrize("name", STAND_INS)
def test_real_heads_are_the_whole_logits(name: str) -> None:
    if not find_spec(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is not installed")
    net = Net(name, fused_heads.real(name)).cuda().bfloat16()
    x, y = torch.randn(N, H, device="cuda").bfloat16(), torch.randint(V, (N,), device="cuda")
    torch.manual_seed(1)
    a, b = (net.lm_head(net.dropout(net.body(x))).float() for _ in range(2))
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    s = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
    wanted = (F.cross_entropy(a, y) + F.cross_entropy(b, y)) / 2 + 0.75 * s.mean()
    wanted.backward()  # type: ignore[no-untyped-call]
    wanted_gradients = [w.grad.clone() for w in net.parameters() if w.grad is not None]
    net.zero_grad()
    torch.manual_seed(1)
    output = patch_model(net, rdrop=1.5)(x, y)
    output["loss"].backward()
    torch.testing.assert_close(output["loss"].float(), wanted, rtol=1e-2, atol=1e-2)
    for w, grad in zip(net.parameters(), wanted_gradients, strict=True):
        assert w.grad is not None
        assert (w.grad - grad).float().norm() < 0.05 * grad.float().norm()
    right = (b.argmax(-1) == y).float().mean()
    if name == "trl":
        assert (output["right"].float().mean() - right).abs() < 0.03
    if name == "liger":
        assert (output["accuracy"] - right).abs() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scaling", [Scaling(), Scaling(softcap=20.0, scale=0.5)], ids=["plain", "softcap"])
def test_chunks_on_a_gpu_are_those_of_the_cpu(
    dtype: torch.dtype, scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.hooks.rdrop.fused.GPU_LOGITS", 40 * V)
    found = {}
    for device, given in (("cpu", torch.float64), ("cuda", dtype)):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(n, H, generator=generator).to(dtype) for n in (N, N, V)]
        a, b, weight = (x.to(device, given).requires_grad_() for x in tensors)
        y = torch.randint(V, (N,), generator=generator).to(device)
        nll, s = fused_rows(Pass(a, weight), Pass(b, weight), y, scaling)
        total = fused_sum(Pass(a, weight), Pass(b, weight), y, scaling, 0.75)[0]
        grads = [torch.autograd.grad(loss, (a, b, weight)) for loss in ((nll + 0.75 * s).sum(), total)]
        found[device] = [x.double().cpu() for x in (total.detach(), *grads[0], *grads[1])]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for got, wanted in zip(found["cuda"], found["cpu"], strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()
