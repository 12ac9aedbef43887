"""Train on two processes with DistributedDataParallel or fully_shard; each writes what it has in the end."""

import sys

import torch
import torch.distributed as dist
from nets import batches, build
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel


def main(way, out):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = build()
    if way == "ddp":
        called = DistributedDataParallel(model)
    else:
        fully_shard(model.body)
        called = fully_shard(model)
    optimizer = torch.optim.SGD(called.parameters(), lr=0.1)
    called.train()
    for number, (x, labels) in enumerate(batches(10)[rank::2]):
        torch.manual_seed(100 + number + 1000 * rank)
        F.cross_entropy(called(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    final = {name: w.full_tensor() if way == "fsdp" else w for name, w in model.state_dict().items()}
    torch.save(final, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
