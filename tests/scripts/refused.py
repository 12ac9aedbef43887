"""Train with a loss that R-Drop has no formula for, and catch what comes of it; or do not."""

import os
import sys
import threading

import torch
from nets import batches, build
from torch.nn import functional as F


def train(number=0):
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, _ in batches():
        logits = model(x)
        F.triplet_margin_loss(logits[:1], logits[1:2], logits[2:3]).backward()
        optimizer.step()
        optimizer.zero_grad()


def swallow():
    try:
        train()
    except Exception as error:
        print("caught", type(error).__name__)


def swallow_all_and_vanish():
    swallow()
    os._exit(0)


def in_thread():
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()


def in_child(method):
    context = torch.multiprocessing.start_processes(train, nprocs=1, join=False, start_method=method)
    try:
        context.join()
    except torch.multiprocessing.ProcessRaisedException:
        print("caught a child's")


def then_well():
    swallow()
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, labels in batches():
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


WAYS = {
    "train": train,
    "swallow": swallow,
    "vanish": swallow_all_and_vanish,
    "thread": in_thread,
    "spawn": lambda: in_child("spawn"),
    "fork": lambda: in_child("fork"),
    "then well": then_well,
}

if __name__ == "__main__":
    WAYS[sys.argv[1]]()
    print("came to its end")
