"""Two processes that train one model with DeepSpeed's ZeRO, beside one process with all the rows and torch's optimizer.

Run as `python -m ranks_zero RANK FOLDER CASE...`; what each case measured is left in FOLDER as JSON.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks_rdrop
import seeded
import torch
import torch.distributed as dist
from ranks import SIZE, STEPS, build, main, own, rows
from torch import nn
from torch.nn import functional as F  # noqa: N812

from surgery import Mixout, RDrop, RecAdam, SourceError, describe, patch_model, perturb_model, stats, unpatch_model

LR, DECAY = 1e-2, 0.1


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Make one of two groups, as Trainer does."""
    named = list(model.named_parameters())
    groups = [
        {"params": [w for name, w in named if name.endswith("bias")], "weight_decay": 0.0},
        {"params": [w for name, w in named if not name.endswith("bias")]},
    ]
    return torch.optim.AdamW(groups, LR, weight_decay=DECAY)


def config_of(stage: int) -> dict[str, Any]:
    from zero import config  # of tests/scripts

    settings: dict[str, Any] = config(stage, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    return settings


def engine_of(model: nn.Module, stage: int) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config_of(stage))[0]


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters, gathered."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: w.detach().clone() for name, w in model.named_parameters()}


def difference(engine: Any, reference: nn.Module) -> float:
    trained, wanted = whole(engine.module), whole(reference)
    return max((trained[name] - w).abs().max().item() for name, w in wanted.items())


def train_whole(
    model: nn.Module, loss_of: Callable[[nn.Module, int, int], torch.Tensor], ranks: tuple[int, ...]
) -> torch.Tensor:
    """Train with torch's optimizer on the mean of some losses; return them.

    Args:
        loss_of: of a model, for a step and a rank.
        ranks: whose losses.
    """
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        each = [loss_of(model, step, rank) for rank in ranks]
        loss = sum(each, torch.zeros(())) / len(each)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def train_engine(engine: Any, loss_of: Callable[[nn.Module, int, int], torch.Tensor]) -> torch.Tensor:
    """Train with DeepSpeed on the losses of this rank; return the mean of both ranks' losses."""
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, step, dist.get_rank())
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    found = torch.stack(losses)
    dist.all_reduce(found)
    return found / dist.get_world_size()


def loss_of_own_rows(model: nn.Module, step: int, rank: int) -> torch.Tensor:  # noqa: ARG001
    torch.manual_seed(100 + step)
    x, y = (own(one) for one in rows())
    return (model(x) - y).square().mean()


def loss_of_all_rows(model: nn.Module, step: int, rank: int) -> torch.Tensor:  # noqa: ARG001
    torch.manual_seed(100 + step)
    x, y = rows()
    return (model(x) - y).square().mean()


def odd() -> nn.Module:
    """Make a network of which ZeRO-3 pads a weight and two biases to split them."""
    torch.manual_seed(0)
    layers = nn.Linear(SIZE, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, SIZE)
    return nn.Sequential(*layers).double()


def case(stage: int, *, is_first: bool, net: Callable[[], nn.Module] = odd, **settings: Any) -> Any:
    reference, model = patch_model(net(), **settings), net()
    if is_first:
        patch_model(model, **settings)
    engine = engine_of(model, stage)
    if not is_first:
        patch_model(engine, **settings)
    expected, losses = train_whole(reference, loss_of_all_rows, (0,)), train_engine(engine, loss_of_own_rows)
    got, wanted = stats(engine), stats(reference)
    found = {
        "losses": (losses - expected).abs().max().item(),
        "parameters": difference(engine, reference),
        "moved": (expected[0] - expected[-1]).abs().item(),
        "distance": abs(got["distance"] - wanted["distance"]) / wanted["distance"],
        "share": got["w_pre_bytes"] / wanted["w_pre_bytes"],
        "steps": [got["steps"], describe(engine).anchored, describe(engine).recalled, got.get("recadam_t", 0)],
        "unmixed": describe(engine).unmixed,
    }
    unpatch_model(engine)
    return found | {"left": [name for one in model.modules() for name in vars(one) if name.startswith("_surgery")]}


def rdrop(stage: int, *, is_first: bool, is_inside: bool, every: int) -> Any:
    reference, model = ranks_rdrop.build(), ranks_rdrop.build()
    settings = RDrop(ranks_rdrop.ALPHA, passes="two", every=every)
    if is_first:
        patch_model(model, rdrop=settings)
    engine = engine_of(model, stage)
    if not is_first:
        patch_model(engine, rdrop=settings)

    def seeded(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(100 * step + rank)
        return ranks_rdrop.rows(step, rank)

    def by_hand(each: nn.Module, step: int, rank: int) -> torch.Tensor:
        x, y = seeded(step, rank)
        if (step + 1) % every:
            return F.cross_entropy(each(x)[0], y)
        return ranks_rdrop.direct(each, x, y)

    def ours(each: nn.Module, step: int, rank: int) -> torch.Tensor:
        x, y = seeded(step, rank)
        loss: torch.Tensor = each(x, y)[1] if is_inside else F.cross_entropy(each(x)[0], y)
        return loss

    expected, losses = train_whole(reference, by_hand, (0, 1)), train_engine(engine, ours)
    fired = stats(engine)["rdrop_fired"]
    unpatch_model(engine)
    return {
        "losses": (losses - expected).abs().max().item(),
        "parameters": difference(engine, reference),
        "fired": fired,
    }


def classifier(folder: Path) -> Any:
    """Load a BERT in float32, which zero.Init takes."""
    if dist.get_rank() == 0 and not folder.exists():
        seeded.bert_folder(folder)
    dist.barrier()
    return seeded.BertForSequenceClassification.from_pretrained(folder)


def noise_of(folder: Path, stage: int, *, is_first: bool) -> Any:
    """Perturb before DeepSpeed's engine is made, at stage 3 weights that zero.Init has split, or after it.

    A step with an lr of 0 then takes the weights from the copies that the optimizer has.
    """
    from transformers.integrations import HfDeepSpeedConfig

    reference = classifier(folder)
    splits = HfDeepSpeedConfig(config_of(stage)) if stage == 3 else None  # as long as it lives
    model = classifier(folder)
    head = model.get_parameter("classifier.weight")
    is_split = not head.numel()
    wanted = perturb_model(reference, lam=0.15)
    if is_first:
        recipe = perturb_model(model, lam=0.15)
    engine = engine_of(model, stage)
    if not is_first:
        recipe = perturb_model(engine, lam=0.15)
    del splits
    names = [tensor.name for tensor in recipe.tensors if tensor.copied is None]
    found = {"split": is_split, "perturbed": len(names), "equal": [_is_equal(engine.module, reference)]}
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    batch = seeded.batch(2, seed=dist.get_rank())
    engine.backward(engine(**batch).loss)
    engine.step()
    found["equal"].append(_is_equal(engine.module, reference))
    found["stds"] = [tensor.std for tensor in recipe.tensors] == [tensor.std for tensor in wanted.tensors]
    found["again"] = perturb_model(engine, lam=0.15).notes[-1]
    return found


def _is_equal(model: nn.Module, reference: nn.Module) -> bool:
    got, wanted = whole(model), dict(reference.named_parameters())
    return all(torch.equal(got[name], w) for name, w in wanted.items() if not name.startswith("classifier"))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.lstm(x[None])[0][0])
        return found


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    return Recurrent().double()


class Attending(nn.Module):
    """nn.MultiheadAttention reads its out_proj past that layer, so that ZeRO-3 does not put its weight together."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.attention(x, x, x)[0]
        return found


def attending() -> Any:
    engine = engine_of(patch_model(Attending().double(), mixout=0.5), 3)
    try:
        engine(own(rows()[0]))
    except SourceError as error:
        return {"refusal": str(error)}
    return {"refusal": ""}


METHODS: dict[str, dict[str, Any]] = {
    "mixout": {"mixout": Mixout(0.5)},
    "anchor": {"anchor": 2.0},
    "recadam": {"recadam": RecAdam(gamma=20.0, k=1.0, t0=2)},
    "element and anchor": {"mixout": Mixout(0.5, granularity="element"), "anchor": 2.0},
}
STAGES, ORDERS = (1, 2, 3), ("before", "after")
TRAINED: dict[str, Callable[[], Any]] = {
    f"zero {stage} {order} {name}": lambda stage=stage, order=order, settings=settings: case(  # type: ignore[misc]
        stage, is_first=order == "before", **settings
    )
    for stage in STAGES
    for order in ORDERS
    for name, settings in METHODS.items()
}
for option in ("is_tied", "is_checkpointed"):
    TRAINED[f"zero 3 before mixout {option} element and anchor"] = lambda option=option: case(  # type: ignore[misc]
        3, is_first=True, net=lambda: build(**{option: True}), **METHODS["element and anchor"]
    )
TRAINED["zero 3 after mixout of an LSTM and anchor"] = lambda: case(
    3, is_first=False, net=recurrent, mixout=0.5, anchor=2.0
)
PAIRED: dict[str, Callable[[], Any]] = {
    f"zero {stage} {order} rdrop every {every}": lambda stage=stage, order=order, every=every: rdrop(  # type: ignore[misc]
        stage, is_first=order == "before", is_inside=every == 1, every=every
    )
    for stage in STAGES
    for order in ORDERS
    for every in (1, 2)
}
NOISY: dict[str, Callable[[], Any]] = {
    f"zero {stage} noise {order}": lambda stage=stage, order=order: noise_of(  # type: ignore[misc]
        Path(sys.argv[2]) / "bert", stage, is_first=order == "before"
    )
    for stage in STAGES
    for order in ORDERS
}
CASES = TRAINED | PAIRED | NOISY | {"zero 3 attention": attending}


if __name__ == "__main__":
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2"}
    from zero import start

    start()
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], CASES)
