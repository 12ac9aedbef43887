"""A plain loop of torch, one model after another: the loss in the model or outside of it, compiled or not."""

import sys

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, has_loss=False):
        super().__init__()
        self.has_loss = has_loss
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Linear(12, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return F.cross_entropy(logits, labels) if self.has_loss else logits


def train(model, optimizer, step):
    generator = torch.Generator().manual_seed(0)
    model.train()
    for number in range(5):
        x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (4,), generator=generator)
        torch.manual_seed(100 + number)
        step(model, x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def outside(model, x, labels):
    return F.cross_entropy(model(x), labels)


def inside(model, x, labels):
    return model(x, labels)


def accumulated(model, optimizer):
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (4,), generator=generator)
        if number % 2 == 0:
            torch.manual_seed(100 + number // 2)
        (outside(model, x, labels) / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()


def run(way):
    torch.manual_seed(0)
    model = Net(has_loss=way == "inside").double()
    if way == "outside":
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), outside)
    elif way == "inside":
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), inside)
    elif way == "accumulated":
        accumulated(model, torch.optim.SGD(model.parameters(), lr=0.1))
    elif way == "parts":  # the submodules are called, the model never is
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, lambda model, x, labels: F.cross_entropy(model.head(model.body(x)), labels))
    elif way == "compiled first":
        compiled = torch.compile(model, backend="aot_eager")
        train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1), outside)
    elif way == "compiled after":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(torch.compile(model, backend="aot_eager"), optimizer, outside)
    elif way == "compiled in place":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.compile(backend="aot_eager")
        train(model, optimizer, outside)
    elif way == "compiled step":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, torch.compile(outside, backend="aot_eager"))
    return model.state_dict()


if __name__ == "__main__":
    torch.save({way: run(way) for way in sys.argv[2:]}, sys.argv[1])
