"""Train in child processes, and in no other; say which process was which."""

import json
import multiprocessing
import os
import sys

import torch
import torch._dynamo  # once for all that are forked: an optimizer imports it
from nets import batches, build
from torch import nn
from torch.nn import functional as F


def train(model, count=5):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, labels in batches(count):
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_and_vanish():
    train(build())
    os._exit(0)


def update_by_hand():
    model = build().train()
    for x, labels in batches():
        F.cross_entropy(model(x), labels).backward()
        with torch.no_grad():
            for w in model.parameters():
                w -= 0.1 * w.grad
        model.zero_grad()


def evaluate():
    model = build().eval()
    with torch.no_grad():
        model(batches()[0][0])


def in_replicas():
    train(nn.DataParallel(build()))


class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(6, 6, 3)

    def forward(self, x):
        return self.layer(x, x)


def of_no_weights():
    train(Squared().double())


def quantized():
    model = build()
    model.is_quantized = True  # as transformers says it of what it has loaded
    train(model)


def fork_plainly():
    pid = os.fork()
    if pid == 0:
        train(build())
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def spawned(number):
    train(build())


def spawn(function, *args):
    context = torch.multiprocessing.spawn(function, args=args, nprocs=1, join=False)
    try:
        context.join()
    except torch.multiprocessing.ProcessExitedException as error:
        return context.pids()[0], error.exit_code
    return context.pids()[0], 0


def share(number, model):
    train(model)


FORKED = [train_and_vanish, update_by_hand, evaluate, in_replicas, of_no_weights, quantized]


def main(*names):
    found = {}
    context = multiprocessing.get_context("fork")
    work = {function.__name__: function for function in FORKED} | {"trained": train_trained}
    for name in names:
        if name == "spawned":
            found[name] = spawn(spawned)
        elif name == "shared":
            found[name] = spawn(share, build().share_memory())
        elif name == "forked plainly":
            found[name] = fork_plainly(), 0
        else:
            child = context.Process(target=work[name])
            child.start()
            child.join()
            found[name] = child.pid, child.exitcode
    print(json.dumps(found | {"parent": [os.getpid(), 0]}))


def train_trained():
    train(build())


if __name__ == "__main__":
    main(*sys.argv[1:])
