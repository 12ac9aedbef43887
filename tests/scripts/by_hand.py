"""Train without an optimizer of torch, in several ways."""

import sys

import torch
from nets import batches, build
from torch.nn import functional as F

LR = 0.1


class Descent:
    """An optimizer of one's own, as fastai and Keras have."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    @torch.no_grad()
    def step(self):
        for w in self.parameters:
            w.data = w.data - LR * w.grad

    def zero_grad(self):
        for w in self.parameters:
            w.grad.detach_().zero_()


def by_backward(model):
    """The loop of torch's tutorials."""
    for number, (x, labels) in enumerate(batches()):
        torch.manual_seed(100 + number)
        F.cross_entropy(model(x), labels).backward()
        with torch.no_grad():
            for w in model.parameters():
                w -= LR * w.grad
                w.grad = None


def by_grad(model):
    for number, (x, labels) in enumerate(batches()):
        torch.manual_seed(100 + number)
        loss = F.cross_entropy(model(x), labels)
        gradients = torch.autograd.grad(loss, model.parameters())
        with torch.no_grad():
            for w, gradient in zip(model.parameters(), gradients, strict=True):
                w.add_(gradient, alpha=-LR)


def by_own_optimizer(model):
    optimizer = Descent(model.parameters())
    for number, (x, labels) in enumerate(batches()):
        torch.manual_seed(100 + number)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def main():
    final, *ways = sys.argv[1:]
    known = {"backward": by_backward, "backward again": by_backward, "grad": by_grad, "own optimizer": by_own_optimizer}
    found = {}
    for way in ways:
        model = build().train()
        known[way](model)
        found[way] = model.state_dict()
    torch.save(found, final)


if __name__ == "__main__":
    main()
