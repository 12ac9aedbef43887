"""Train on two processes, with DistributedDataParallel and with fully_shard, and resume; each writes what it has."""

import sys

import torch
import torch.distributed as dist
from nets import batches, build
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


def train(model, checkpoint=None, first=0):
    rank = dist.get_rank()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if first:
        set_model_state_dict(model, checkpoint, options=StateDictOptions(full_state_dict=True))
    model.train()
    for number, (x, labels) in enumerate(batches(10)[rank::2]):
        if number < first:
            continue
        if number == 3 and checkpoint is not None:
            checkpoint.update(gathered(model))
        torch.manual_seed(100 + number + 1000 * rank)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def replicated():
    model = build()
    train(DistributedDataParallel(model))
    return model.state_dict()


def gathered(model):
    return {name: w.full_tensor().clone() for name, w in model.state_dict().items()}


def sharded(**resume):
    model = build()
    model.load_state_dict(build().state_dict())  # as from a pretrained checkpoint
    fully_shard(model.body)
    train(fully_shard(model), **resume)
    return gathered(model)


def main(out):
    dist.init_process_group("gloo")
    checkpoint = {}
    left = {"ddp": replicated(), "fsdp": sharded(checkpoint=checkpoint)}
    left["resumed"] = sharded(checkpoint=checkpoint, first=3)
    torch.save(left, f"{out}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
