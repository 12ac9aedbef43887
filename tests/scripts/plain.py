"""A plain loop of torch, one model after another: the loss in the model or outside of it, compiled or not."""

import sys

import torch
from nets import batches, build
from torch.nn import functional as F


def outside(model, x, labels):
    return F.cross_entropy(model(x), labels)


def inside(model, x, labels):
    return model(x, labels)


def train(model, optimizer, loss=outside):
    model.train()
    for number, (x, labels) in enumerate(batches()):
        torch.manual_seed(100 + number)
        loss(model, x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def accumulate(model, optimizer):
    for number, (x, labels) in enumerate(batches(6)):
        if number % 2 == 0:
            torch.manual_seed(100 + number // 2)
        (outside(model, x, labels) / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()


def start_over(model):
    """A new optimizer for every step."""
    for number, (x, labels) in enumerate(batches()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(100 + number)
        outside(model, x, labels).backward()
        optimizer.step()
        model.zero_grad()


def call_back(model):
    """An optimizer that calls for the gradients itself, several times in a step."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    for number, (x, labels) in enumerate(batches()):

        def gradients(x=x, labels=labels):
            optimizer.zero_grad()
            loss = outside(model, x, labels)
            loss.backward()
            return loss

        torch.manual_seed(100 + number)
        optimizer.step(gradients)


def run(way):
    model = build(has_loss=way == "inside")
    if way == "compiled first":
        compiled = torch.compile(model, backend="eager")
        train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1))
        return model.state_dict()
    if way == "many optimizers":
        start_over(model)
        return model.state_dict()
    if way == "closure":
        call_back(model)
        return model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if way == "outside":
        train(model, optimizer)
    elif way == "inside":
        train(model, optimizer, inside)
    elif way == "accumulated":
        accumulate(model, optimizer)
    elif way == "compiled after":
        train(torch.compile(model, backend="eager"), optimizer)
    elif way == "compiled in place":
        model.compile(backend="eager")
        train(model, optimizer)
    elif way == "compiled step":
        train(model, optimizer, torch.compile(outside, backend="eager"))
    return model.state_dict()


if __name__ == "__main__":
    torch.save({way: run(way) for way in sys.argv[2:]}, sys.argv[1])
