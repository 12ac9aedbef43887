"""Two processes that train one patched model between them, each beside its own run of the whole in one process.

Run as `python -m ranks RANK FOLDER CASE...`; what each case measured is left in FOLDER as JSON.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from surgery import Mixout, SettingError, describe, patch_model, stats, unpatch_model

STEPS, SIZE, ROWS = 4, 8, 3
Tensors = dict[str, torch.Tensor]


class Block(nn.Module):
    def __init__(self, *, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)
        self.is_checkpointed = is_checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_checkpointed:
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(self.inner(x).relu())


class Others(nn.Module):
    """Layers whose weights are not called `weight`, over each row as two positions."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(SIZE // 2, SIZE // 2, batch_first=True)
        self.attention = nn.MultiheadAttention(SIZE // 2, 2, bias=False, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.gru(x.unflatten(1, (2, -1)))
        return x + self.attention(hidden, hidden, hidden)[0].flatten(1)


class Net(nn.Module):
    def __init__(
        self,
        *,
        is_checkpointed: bool = False,
        has_unused: bool = False,
        is_tied: bool = False,
        has_others: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(is_checkpointed=is_checkpointed) for _ in range(2)])
        self.head = nn.Linear(SIZE, SIZE)
        if has_unused:
            self.unused = nn.Linear(SIZE, SIZE)
        if is_tied:
            self.first = nn.Linear(SIZE, SIZE)
            self.first.weight = self.head.weight
        if has_others:
            self.blocks.append(Others())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "first"):
            x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(**options: bool) -> Net:
    torch.manual_seed(0)
    return Net(**options).double()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    both = torch.randn(2, ROWS * dist.get_world_size(), SIZE, generator=generator, dtype=torch.float64)
    return both[0], both[1]


def own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[dist.get_rank() * ROWS :][:ROWS]


def train(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, note: Callable[[], Any] = lambda: None
) -> tuple[torch.Tensor, list[Any]]:
    """Train; the seed of each step is the same wherever it runs, and so are the masks."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    losses, notes = [], []
    for step in range(STEPS):
        torch.manual_seed(100 + step)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        notes.append(note())
    return torch.stack(losses), notes


def whole(model: nn.Module) -> Tensors:
    return {
        name: (w.full_tensor() if hasattr(w, "full_tensor") else w).detach().clone()
        for name, w in model.named_parameters()
    }


def compare(
    model: nn.Module, reference: nn.Module, *, note: Callable[[], Any] = lambda: None, inner: nn.Module | None = None
) -> dict[str, Any]:
    """Train `model` on this rank's rows and `reference` on all of them."""
    x, y = rows()
    expected, _ = train(reference, x, y)
    losses, notes = train(model, own(x), own(y), note=note)
    dist.all_reduce(losses)
    trained, wanted = whole(inner or model), whole(reference)
    return {
        "losses": (losses / dist.get_world_size() - expected).abs().max().item(),
        "parameters": max((trained[name] - wanted[name]).abs().max().item() for name in wanted),
        "moved": (expected[0] - expected[-1]).abs().item(),
        "notes": notes,
    }


def figures(model: nn.Module, reference: nn.Module) -> dict[str, Any]:
    got, wanted = stats(model), stats(reference)
    return {
        "distance": abs(got["distance"] - wanted["distance"]) / wanted["distance"],
        "steps": got["steps"],
        "share": got["w_pre_bytes"] / wanted["w_pre_bytes"],
        "anchored": describe(model).anchored,
        "uncalled": list(describe(model).uncalled),
    }


def ddp(*, is_first: bool, options: dict[str, bool] | None = None, is_compiled: bool = False, **ddp: bool) -> Any:
    settings: dict[str, Any] = {"mixout": Mixout(0.5), "anchor": 0.1}
    reference, model = patch_model(build(**(options or {})), **settings), build(**(options or {}))
    if is_first:
        patch_model(model, **settings)
    wrapped: Any = DistributedDataParallel(model, **ddp)
    if not is_first:
        patch_model(wrapped, **settings)
    if is_compiled:
        wrapped = torch.compile(wrapped, backend="aot_eager")
    found = compare(wrapped, reference, inner=model) | figures(wrapped, reference)
    unpatch_model(wrapped)
    return found


def shard(model: Net, *, is_root: bool = True, **options: Any) -> Net:
    for part in [*model.blocks, model if is_root else model.head]:
        fully_shard(part, **options)
    return model


def fsdp(
    *,
    is_first: bool,
    granularity: str = "neuron",
    options: dict[str, bool] | None = None,
    is_root: bool = True,
    is_compiled: bool = False,
    anchor: float | None = 0.1,
    **sharding: Any,
) -> Any:
    settings: dict[str, Any] = {"mixout": Mixout(0.5, granularity=granularity), "anchor": anchor}
    reference, model = patch_model(build(**(options or {})), **settings), build(**(options or {}))
    if is_first:
        patch_model(model, **settings)
    shard(model, is_root=is_root, **sharding)
    if not is_first:
        patch_model(model, **settings)
    if is_compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    found = compare(model, reference, note=lambda: stats(model)["w_pre_bytes"]) | figures(model, reference)
    found["notes"] = [count / stats(reference)["w_pre_bytes"] for count in found["notes"]]
    unpatch_model(model)
    unpatch_model(reference)
    found["unpatched"] = compare(model, reference)
    found["left"] = [name for module in model.modules() for name in vars(module) if name.startswith("_surgery")]
    return found


def moved(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn_like(w))
    return model


def fsdp_bf16(*, is_first: bool) -> Any:
    """One step whose weights are gathered as bfloat16, beside a model that is in bfloat16."""
    w_pre = build().float().state_dict()
    low = patch_model(
        moved(build().float()).bfloat16(), mixout=0.5, w_pre={name: w.bfloat16() for name, w in w_pre.items()}
    )
    model = moved(build().float())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if is_first:
        patch_model(model, mixout=0.5, w_pre=w_pre)
    shard(model, mp_policy=policy)
    if not is_first:
        patch_model(model, mixout=0.5, w_pre=w_pre)
    x, outputs = own(rows()[0]), []
    for each in (low, model):
        torch.manual_seed(5)
        outputs.append(each(x.bfloat16()))
        outputs[-1].float().square().mean().backward()
    wanted = {name: w.grad.float() for name, w in low.named_parameters()}
    for grad in wanted.values():
        dist.all_reduce(grad)
    errors = [
        ((w.grad.full_tensor() - wanted[name] / 2).norm() / wanted[name].norm()).item()
        for name, w in model.named_parameters()
    ]
    return {"outputs": (outputs[0] - outputs[1]).abs().max().item(), "gradients": max(errors)}


def fsdp_state_dict(*, is_first: bool) -> Any:
    w_pre = build().state_dict()
    reference = patch_model(moved(build()), mixout=0.5, w_pre=w_pre)
    model = moved(build())
    if is_first:
        patch_model(model, mixout=0.5, w_pre=w_pre)
    shard(model)
    if not is_first:
        patch_model(model, mixout=0.5, w_pre=w_pre)
    return compare(model, reference) | figures(model, reference)


def fsdp_folder(folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(folder / "bert")
    dist.barrier()  # rank 0 alone has written it
    reference: Any = moved(BertModel.from_pretrained(folder / "bert"))
    model = deepcopy(reference)
    patch_model(reference, w_pre=folder / "bert")
    for layer in model.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    patch_model(model, w_pre=folder / "bert")
    outputs = []
    for each in (reference.train(), model.train()):
        torch.manual_seed(5)
        outputs.append(each(input_ids=torch.arange(12).view(2, 6)).last_hidden_state)
    return {"outputs": (outputs[0] - outputs[1]).abs().max().item()} | figures(model, reference)


def fsdp_on_the_cpu() -> Any:
    """w_pre in the CPU's memory: refused for weights that are split already, kept whole for those split later."""
    settings: dict[str, Any] = {"mixout": 0.5, "anchor": 0.1, "w_pre_device": "cpu"}
    model = shard(build())
    try:
        patch_model(model, **settings)
        refusal = ""
    except SettingError as error:
        refusal = str(error)
    reference, model = patch_model(build(), mixout=0.5, anchor=0.1), shard(patch_model(build(), **settings))
    return {"refusal": refusal} | compare(model, reference) | figures(model, reference)


def fsdp_eval() -> Any:
    """Eval is the identity, and the state_dict of the sharded model has the same names."""
    model = shard(patch_model(moved(build()), mixout=0.5, w_pre=build().state_dict())).eval()
    plain = moved(build())
    x, _ = rows()
    names = list(model.state_dict()) == list(plain.state_dict())
    return {"outputs": (model(x) - plain(x)).abs().max().item(), "names": names}


CASES: dict[str, Callable[[], Any]] = {
    "ddp before": lambda: ddp(is_first=True),
    "ddp after": lambda: ddp(is_first=False),
    "ddp static graph": lambda: ddp(is_first=True, static_graph=True),
    "ddp static graph checkpointed": lambda: ddp(is_first=False, static_graph=True, options={"is_checkpointed": True}),
    "ddp unused": lambda: ddp(is_first=True, find_unused_parameters=True, options={"has_unused": True}),
    "ddp bucket view": lambda: ddp(is_first=True, gradient_as_bucket_view=True),
    "ddp tied": lambda: ddp(is_first=True, options={"is_tied": True}),
    "ddp others": lambda: ddp(is_first=True, options={"has_others": True}),
    "ddp compiled": lambda: ddp(is_first=True, is_compiled=True),
    "fsdp before neuron": lambda: fsdp(is_first=True),
    "fsdp before element": lambda: fsdp(is_first=True, granularity="element"),
    "fsdp after neuron": lambda: fsdp(is_first=False),
    "fsdp after element": lambda: fsdp(is_first=False, granularity="element"),
    "fsdp before no anchor": lambda: fsdp(is_first=True, anchor=None),
    "fsdp before kept whole": lambda: fsdp(is_first=True, reshard_after_forward=False),
    "fsdp after kept whole": lambda: fsdp(is_first=False, reshard_after_forward=False),
    "fsdp before checkpointed": lambda: fsdp(is_first=True, options={"is_checkpointed": True}),
    "fsdp after checkpointed": lambda: fsdp(is_first=False, options={"is_checkpointed": True}, granularity="element"),
    "fsdp before layers only": lambda: fsdp(is_first=True, is_root=False),
    "fsdp after layers only": lambda: fsdp(is_first=False, is_root=False),
    "fsdp before tied": lambda: fsdp(is_first=True, options={"is_tied": True}),
    "fsdp after tied": lambda: fsdp(is_first=False, options={"is_tied": True}, granularity="element"),
    "fsdp before others": lambda: fsdp(is_first=True, options={"has_others": True}),
    "fsdp before compiled": lambda: fsdp(is_first=True, is_compiled=True),
    "fsdp after compiled": lambda: fsdp(is_first=False, is_compiled=True),
    "fsdp bf16 before": lambda: fsdp_bf16(is_first=True),
    "fsdp bf16 after": lambda: fsdp_bf16(is_first=False),
    "fsdp state_dict before": lambda: fsdp_state_dict(is_first=True),
    "fsdp state_dict after": lambda: fsdp_state_dict(is_first=False),
    "fsdp folder": lambda: fsdp_folder(Path(sys.argv[2])),
    "fsdp cpu": fsdp_on_the_cpu,
    "fsdp eval": fsdp_eval,
}


def main(rank: int, folder: Path, names: list[str], cases: dict[str, Callable[[], Any]]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = {}
    for name in names:
        try:
            found[name] = cases[name]()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    with suppress(RuntimeError):  # of a process that has left already
        dist.barrier()  # a process that leaves first makes the other one abort
    os._exit(0)  # all is written; gloo's threads may be freed in an order that aborts the process


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], CASES)
