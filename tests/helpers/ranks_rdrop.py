"""Two processes that train one model under R-Drop, beside the mean of each rank's own two explicit passes.

Run as `python -m ranks_rdrop RANK FOLDER CASE...`; what each case measured is left in FOLDER as JSON.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fused_heads import ChunkedLogProbFunction, stand_in
from ranks import main
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from surgery import RDrop, patch_model, stats, unpatch_model

SIZE, CLASSES, ROWS, ALPHA, STEPS = 8, 5, 4, 1.5, 3
TWO = RDrop(ALPHA, passes="two")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Dropout(0.3)) for _ in "ab"])
        self.head = nn.Linear(SIZE, CLASSES)
        self.unused = nn.Linear(SIZE, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return (logits,) if y is None else (logits, F.cross_entropy(logits, y))


def build(*, has_unused: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net().double()
    if not has_unused:
        del model.unused
    return model


def rows(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


def direct(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a, b = (model(x)[0] for _ in range(2))
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean() / 2
    return (F.cross_entropy(a, y) + F.cross_entropy(b, y)) / 2 + ALPHA / 2 * kl


def train(model: nn.Module, loss_of: Callable[..., torch.Tensor], *, averages: bool) -> dict[str, list[Any]]:
    """Train on this rank's rows; dropout differs by rank.

    Args:
        averages: take the mean of the ranks' gradients, as the wrappers do.
    """
    optimizer, losses, grads = torch.optim.SGD(model.parameters(), 0.1), [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.manual_seed(100 * step + dist.get_rank())
        loss = loss_of(model, *rows(step, dist.get_rank()))
        loss.backward()
        for w in model.parameters():
            if averages and w.grad is not None:
                dist.all_reduce(w.grad)
                w.grad /= dist.get_world_size()
        grads.append([whole(w.grad) for w in model.parameters() if w.grad is not None])
        losses.append(loss.item())
        optimizer.step()
    return {"losses": losses, "grads": grads}


def whole(tensor: Any) -> torch.Tensor:
    full: torch.Tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
    return full


def compare(
    model: nn.Module, reference: nn.Module, *, is_inside: bool, loss_of: Callable[..., torch.Tensor] | None = None
) -> dict[str, Any]:
    def loss_of_logits(each: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = each(x, y)[1] if is_inside else F.cross_entropy(each(x)[0], y)
        return loss

    expected = train(reference, direct, averages=True)
    found = train(model, loss_of or loss_of_logits, averages=False)
    pairs = [pair for a, b in zip(found["grads"], expected["grads"], strict=True) for pair in zip(a, b, strict=False)]
    return {
        "losses": max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)),
        "gradients": max((a - b).abs().max().item() for a, b in pairs),
        "sizes": [max(grad.abs().max().item() for grad in step) for step in expected["grads"]],
    }


def finish(model: nn.Module, found: dict[str, Any]) -> dict[str, Any]:
    found |= {"fired": stats(model)["rdrop_fired"], "kl": stats(model)["kl"]}
    unpatch_model(model)
    with torch.no_grad():
        found["left"] = torch.overrides._len_torch_function_stack()
    return found


class FusedNet(Net):
    """Its head is fused as TRL's is: of a loss outside of it, the log-probabilities are made inside."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        assert y is not None
        for block in self.blocks:
            x = block(x)
        weights = self.head.weight, self.head.bias
        log_probs, *_ = ChunkedLogProbFunction.apply(x, *weights, y, 1.0, 32768, None, 1.0, ("log_probs",))
        return log_probs, -log_probs.mean()


def ddp_fused(*, is_first: bool, is_inside: bool, **options: bool) -> Any:
    """Train with a fused head, beside the whole logits of the same weights."""
    reference, model = build(), build()
    model.__class__ = FusedNet
    if is_first:
        patch_model(model, rdrop=TWO)
    wrapped: Any = DistributedDataParallel(model, **options)
    if not is_first:
        patch_model(wrapped, rdrop=TWO)

    def loss_of(each: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        log_probs, loss = each(x, y)
        return loss if is_inside else -log_probs.sum() / len(y)

    with stand_in("trl"):
        return finish(wrapped, compare(wrapped, reference, is_inside=is_inside, loss_of=loss_of))


def ddp(*, is_first: bool, is_inside: bool, has_unused: bool = False, **options: bool) -> Any:
    reference, model = build(has_unused=has_unused), build(has_unused=has_unused)
    if is_first:
        patch_model(model, rdrop=TWO)
    wrapped: Any = DistributedDataParallel(model, **options)
    if not is_first:
        patch_model(wrapped, rdrop=TWO)
    return finish(wrapped, compare(wrapped, reference, is_inside=is_inside))


def fsdp(*, is_first: bool, is_inside: bool, **options: Any) -> Any:
    reference, model = build(), build()
    if is_first:
        patch_model(model, rdrop=TWO)
    for part in [*model.blocks, model]:
        fully_shard(part, **options)
    if not is_first:
        patch_model(model, rdrop=TWO)
    return finish(model, compare(model, reference, is_inside=is_inside))


WRAPPERS: dict[str, Callable[..., Any]] = {
    "ddp": ddp,
    "ddp static": lambda **case: ddp(static_graph=True, **case),
    "ddp unused": lambda **case: ddp(find_unused_parameters=True, has_unused=True, **case),
    "ddp view": lambda **case: ddp(gradient_as_bucket_view=True, **case),
    "ddp fused": ddp_fused,
    "ddp fused static": lambda **case: ddp_fused(static_graph=True, **case),
    "ddp fused unused": lambda **case: ddp_fused(find_unused_parameters=True, **case),
    "fsdp": fsdp,
    "fsdp resharded": lambda **case: fsdp(reshard_after_forward=True, **case),
    "fsdp kept whole": lambda **case: fsdp(reshard_after_forward=False, **case),
}
CASES: dict[str, Callable[[], Any]] = {
    f"{name} {order} {where}": lambda run=run, order=order, where=where: run(  # type: ignore[misc]
        is_first=order == "before", is_inside=where == "inside"
    )
    for name, run in WRAPPERS.items()
    for order in ("before", "after")
    for where in ("inside", "outside")
}

if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], CASES)
