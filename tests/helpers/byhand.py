"""The papers' objective written out, in the plainest code: what a run must have trained.

NoisyTune's bits are surgery's own, which other tests prove.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from heads import symmetric_kl
from torch import nn
from torch.nn import functional as F  # noqa: N812

P, ALPHA, LAM, ANCHOR = 0.5, 1.0, 0.15, 0.01
NOISE, MIXOUT, RDROP = ("--noisytune", str(LAM)), ("--mixout", str(P)), ("--rdrop", str(ALPHA))
ALL = (*NOISE, *MIXOUT, *RDROP, "--anchor", str(ANCHOR))

Batch = tuple[Any, torch.Tensor]
Step = Sequence[tuple[int | None, Any, torch.Tensor]]
"""What one optimizer step averages over: a seed, an input and its labels each; no seed: go on drawing."""


class Mixed:
    """Mixout, arXiv 1909.11299, on some layers of a model from now on, and the decay toward w_pre.

    Args:
        model: its dropout goes, but that of modules whose path is in `kept`.
        fresh: paths of layers that have no pretrained value.
        w_pre: by the layers' paths; default: the weights as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fresh: Sequence[str] = (),
        kept: Sequence[str] = (),
        w_pre: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.w_pre: dict[nn.Parameter, torch.Tensor] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path not in fresh:
                values = module.weight.detach().clone() if w_pre is None else w_pre[path]
                self.w_pre[module.weight] = values
                module.forward = partial(_mixed_linear, module, values)  # type: ignore[method-assign]
            if isinstance(module, nn.Dropout) and path not in kept:
                module.p = 0.0
            if hasattr(module, "dropout_prob"):  # of attention in transformers 4
                module.dropout_prob = 0.0

    def anchor(self, lr: float) -> None:
        """w <- w - lr * weight * (w - w_pre)."""
        with torch.no_grad():
            for w, w_pre in self.w_pre.items():
                w -= lr * ANCHOR * (w - w_pre)


def _mixed_linear(layer: nn.Linear, w_pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if not layer.training:
        return F.linear(x, layer.weight, layer.bias)
    m = torch.empty(1, layer.in_features, dtype=w_pre.dtype).bernoulli_(1 - P)
    return F.linear(x, w_pre + (layer.weight - w_pre) * m / (1 - P), layer.bias)


def two_passes(logits: Callable[[Any], torch.Tensor], x: Any, labels: torch.Tensor) -> torch.Tensor:
    """R-Drop, arXiv 2106.14448, with two forward passes."""
    return rdrop(logits(x), logits(x), labels)


def doubled_batch(logits: Callable[[Any], torch.Tensor], x: Any, labels: torch.Tensor) -> torch.Tensor:
    """R-Drop as its authors wrote it: one forward pass of the batch twice over."""
    return rdrop(*logits(torch.cat([x, x])).chunk(2), labels)


def plain(logits: Callable[[Any], torch.Tensor], x: Any, labels: torch.Tensor) -> torch.Tensor:
    """No R-Drop."""
    return F.cross_entropy(logits(x), labels)


def rdrop(a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Half of the paper's loss: mean(CE1, CE2) + alpha/2 * 1/2 [KL(P1||P2) + KL(P2||P1)]."""
    ce = (F.cross_entropy(a, labels) + F.cross_entropy(b, labels)) / 2
    return ce + ALPHA / 2 * symmetric_kl(a, b).mean()


def train(
    model: nn.Module,
    steps: Sequence[Step],
    logits: Callable[[Any], torch.Tensor],
    *,
    objective: Callable[..., torch.Tensor] = two_passes,
    mixed: Mixed | None = None,
    lr: float = 0.1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    is_anchored: bool = True,
) -> dict[str, torch.Tensor]:
    """Train by hand, seeding as the scripts do; return the parameters.

    Args:
        logits: of an input, by the model.
    """
    model.train()
    optimizing = optimizer([w for w in model.parameters() if w.requires_grad], lr=lr)
    for parts in steps:
        for seed, x, labels in parts:
            if seed is not None:
                torch.manual_seed(seed)
            (objective(logits, x, labels) / len(parts)).backward()
        if mixed is not None and is_anchored:
            mixed.anchor(lr)
        optimizing.step()
        optimizing.zero_grad()
    return {name: w.detach() for name, w in model.named_parameters()}


def adamw(weights: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)


def seeded_steps(batches: Sequence[Batch]) -> list[Step]:
    """One step for each batch."""
    return [[(100 + number, *batch)] for number, batch in enumerate(batches)]


def assert_equal(got: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], *, tolerance: float = 1e-10) -> None:
    """Assert that a run has the parameters of the loop by hand."""
    assert {name for name in wanted if name not in got} == set()
    far = {name: (got[name] - w).abs().max().item() for name, w in wanted.items()}
    assert {name: distance for name, distance in far.items() if not distance <= tolerance} == {}
