"""Train models of which a run cannot have all, or does not want all."""

import sys

import torch
from nets import Net, batches
from torch import nn
from torch.nn import functional as F


class Headed(Net):
    """Has a second head that is trained, and never called."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(12, 3)

    def forward(self, x):
        return super().forward(x) + self.body(x) @ self.lm_head.weight.T


class Squared(nn.Module):
    """Has no layer that can be mixed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(6, 6, 3)

    def forward(self, x):
        return self.layer(x, x)


def train(kind):
    torch.manual_seed(0)
    model = kind().double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, labels in batches():
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    kinds = {"Net": Net, "Headed": Headed, "Squared": Squared}
    for name in sys.argv[1:]:
        train(kinds[name])
