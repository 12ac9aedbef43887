"""A plain loop of torch on a device."""

import sys

import torch
from nets import batches, build
from torch.nn import functional as F


def train(model, device):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, (x, labels) in enumerate(batches()):
        torch.manual_seed(100 + number)
        F.cross_entropy(model(x.to(device)), labels.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


if __name__ == "__main__":
    torch.save(train(build().to(sys.argv[1]), sys.argv[1]), sys.argv[2])
