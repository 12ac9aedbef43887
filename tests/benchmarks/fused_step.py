"""Time a training step through TRL's fused head, plain and under R-Drop, by both clocks. bench_rdrop.py runs this.

One Llama of few layers and many words goes through all ways in turn, so that every ratio is of one run. `whole logits`
is R-Drop of the model's own loss, which makes them.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import RDrop, unpatch_model
from surgery import patch_model as patch

BATCH = (2, 128)


def llama() -> Any:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32000, attention_dropout=0.1, **sizes))


def fused(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss as SFTTrainer makes it."""
    log_probs = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    loss: torch.Tensor = -log_probs.sum() / log_probs.numel()
    return loss


def whole(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


WAYS: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    "fused": (fused, False),
    "fused, rdrop": (fused, True),
    "whole logits": (whole, False),
    "whole logits, rdrop": (whole, True),
}


def report_fused_steps(device: str, rounds: int) -> None:
    """Time the steps, and print a table with ratios to the fused one without R-Drop."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        print("fused step: TRL is not installed")
        return
    torch.manual_seed(0)
    model = llama().to(device).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    ids = torch.randint(32000, BATCH, device=device)
    taken: dict[str, list[tuple[float, float]]] = {}
    for round_ in range(rounds + 1):
        for name, (loss_of, has_rdrop) in WAYS.items():
            if has_rdrop:
                patch(model, rdrop=RDrop(1.0, passes="two"))
            start = _clocks(device)
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            end = _clocks(device)
            if has_rdrop:
                unpatch_model(model)
            if round_:  # the first goes untimed
                taken.setdefault(name, []).append((end[0] - start[0], end[1] - start[1]))
    _print(taken, f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")


def _clocks(device: str) -> tuple[float, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _print(taken: dict[str, list[tuple[float, float]]], what: str) -> None:
    print(
        f"step through TRL's fused head: {what}, Llama of 6 x 384, 32000 words, {BATCH[0]} x {BATCH[1]} tokens, AdamW"
    )
    print(f"{'':20}{'median ms':>11}{'x fused':>9}{'CPU ms':>11}{'x fused':>9}")
    medians = {name: [statistics.median(x) for x in zip(*values, strict=True)] for name, values in taken.items()}
    for name, (wall, cpu) in medians.items():
        base = medians["fused"]
        print(f"{name:20}{wall * 1e3:11.1f}{wall / base[0]:9.2f}{cpu * 1e3:11.1f}{cpu / base[1]:9.2f}")
