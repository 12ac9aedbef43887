"""A training step to be timed. Not in common.py: a process that is measured would start with the memory of torch."""

import time
from collections.abc import Callable
from typing import Any

import torch


class Training:
    """A classifier, its optimizer, a batch, and the step that is timed.

    Args:
        make: makes the model.
        batch: rows, and tokens of each.
        device: cpu or cuda.
    """

    def __init__(self, make: Callable[[], Any], batch: tuple[int, int], device: str) -> None:
        torch.manual_seed(0)
        self.model = make().to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-5)
        self.inputs = torch.randint(1000, 30000, batch, device=device)
        self.labels = torch.randint(0, 2, batch[:1], device=device)
        self.device = device

    def step(self, loss_of: Callable[..., torch.Tensor], model: Any) -> float:
        """Return the step's seconds.

        Args:
            loss_of: takes the model, inputs and labels.
            model: the model, or what has been made of it.
        """
        start = self._now()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            loss = loss_of(model, self.inputs, self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - start

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def plain(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss that the model makes itself."""
    loss: torch.Tensor = model(input_ids=inputs, labels=labels).loss
    return loss
