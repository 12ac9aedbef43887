"""A plain loop that loads pretrained weights, writes a checkpoint, and goes on from it in another process."""

import sys

import torch
from nets import batches, build
from torch.nn import functional as F


def train(model, optimizer, first=0, checkpoint=None):
    model.train()
    for number, (x, labels) in enumerate(batches()):
        if number < first:
            continue
        torch.manual_seed(100 + number)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 2 and checkpoint:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    return model.state_dict()


def start(pretrained, order):
    """Build the model and its optimizer, and load what `order` says, in its order."""
    model = build()
    optimizer = None
    for what in order.split():
        if what == "optimizer":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        elif what == "pretrained":
            model.load_state_dict(torch.load(pretrained))
        elif what == "same":
            model.load_state_dict(model.state_dict())
        elif what == "assigned":
            model.load_state_dict(torch.load("checkpoint.pt")["model"], assign=True)
        elif what == "model":
            model.load_state_dict(torch.load("checkpoint.pt")["model"])
        elif what == "state":
            optimizer.load_state_dict(torch.load("checkpoint.pt")["optimizer"])
    return model, optimizer


def main(pretrained, out, *orders):
    left = {}
    for order in orders:
        model, optimizer = start(pretrained, order)
        if "state" in order:
            left[order] = train(model, optimizer, first=3)
        else:
            left[order] = train(model, optimizer, checkpoint="checkpoint.pt")
    torch.save(left, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
