"""A small network of torch, and its data."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class Net(nn.Module):
    def __init__(self, has_loss=False):
        super().__init__()
        self.has_loss = has_loss
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Linear(12, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return F.cross_entropy(logits, labels) if self.has_loss else logits


def build(has_loss=False):
    torch.manual_seed(0)
    return Net(has_loss).double()


def batches(count=5):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 6, generator=generator, dtype=torch.float64), torch.randint(3, (4,), generator=generator))
        for _ in range(count)
    ]
