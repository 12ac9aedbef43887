"""The papers' objective written out, in the plainest code: what a run must have trained.

NoisyTune's bits are surgery's own, which other tests prove.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from heads import symmetric_kl
from torch import nn
from torch.nn import functional as F  # noqa: N812

P, ALPHA, LAM, ANCHOR = 0.5, 1.0, 0.15, 0.01
ALL = ("--mixout", str(P), "--rdrop", str(ALPHA), "--noisytune", str(LAM), "--anchor", str(ANCHOR))
Batch = tuple[Any, torch.Tensor]


class Mixed:
    """Mixout, arXiv 1909.11299, on some layers of a model from now on, and the decay toward w_pre.

    Args:
        model: its dropout goes, but that of modules whose path is in `kept`.
        fresh: paths of layers that have no pretrained value.
        p: None: the layers are decayed alone.
    """

    def __init__(
        self, model: nn.Module, *, fresh: Sequence[str] = (), kept: Sequence[str] = (), p: float | None = P
    ) -> None:
        self.w_pre: dict[nn.Parameter, torch.Tensor] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path not in fresh and module.weight.requires_grad:
                self.w_pre[module.weight] = module.weight.detach().clone()
                if p is not None:
                    module.forward = partial(_mixed_linear, module, self.w_pre[module.weight], p)
            if isinstance(module, nn.Dropout) and path not in kept and p is not None:
                module.p = 0.0

    def anchor(self, lr: float) -> None:
        """w <- w - lr * weight * (w - w_pre)."""
        with torch.no_grad():
            for w, w_pre in self.w_pre.items():
                if w.grad is not None:
                    w -= lr * ANCHOR * (w - w_pre)


def _mixed_linear(layer: nn.Linear, w_pre: torch.Tensor, p: float, x: torch.Tensor) -> torch.Tensor:
    w = layer.weight
    if not layer.training:
        return F.linear(x, w, layer.bias)
    m = torch.empty(1, layer.in_features, dtype=w.dtype).bernoulli_(1 - p)
    return F.linear(x, w_pre + (w - w_pre) * m / (1 - p), layer.bias)


def objective(logits: Callable[[], torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """R-Drop, arXiv 2106.14448, halved: mean(CE1, CE2) + alpha/2 * 1/2 [KL(P1||P2) + KL(P2||P1)]."""
    a, b = logits(), logits()
    ce = (F.cross_entropy(a, labels) + F.cross_entropy(b, labels)) / 2
    return ce + ALPHA / 2 * symmetric_kl(a, b).mean()


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    logits: Callable[[Any], torch.Tensor],
    *,
    mixed: Mixed | None,
    lr: float,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    accumulate: int = 1,
    first: int = 0,
) -> dict[str, torch.Tensor]:
    """Train by hand, seeding each optimizer step as the scripts do; return the parameters.

    Args:
        logits: of an input, by the model.
        first: the number of the first step.
    """
    model.train()
    steps = optimizer([w for w in model.parameters() if w.requires_grad], lr=lr)
    for number, (x, labels) in enumerate(batches):
        if number % accumulate == 0:
            torch.manual_seed(100 + first + number // accumulate)
        (objective(lambda x=x: logits(x), labels) / accumulate).backward()
        if number % accumulate == accumulate - 1:
            if mixed is not None:
                mixed.anchor(lr)
            steps.step()
            steps.zero_grad()
    return {name: w.detach() for name, w in model.named_parameters()}


def assert_equal(got: dict[str, Any], wanted: dict[str, torch.Tensor], *, tolerance: float = 1e-10) -> None:
    """Assert that a run's state_dict has the parameters of the loop by hand."""
    assert {name for name in wanted if name not in got} == set()
    far = {name: (got[name] - w).abs().max().item() for name, w in wanted.items()}
    assert {name: distance for name, distance in far.items() if not distance <= tolerance} == {}
