"""Time a training step of LoRA with and without Mixout and the anchor, in turn, step by step; and the bytes of w_pre.

One BERT-shaped model with LoRA on query and value and one AdamW go through all ways, so that every ratio is of one run.
The reference is LoRA without dropout, for Mixout sets lora_dropout to 0.

    python tests/benchmarks/bench_lora.py [--device cuda] [--quick] [--rounds N] [--rank R]
"""

import argparse
import logging
import statistics
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from bench_weights import BASE, LARGE, TINY
from peft import LoraConfig, get_peft_model
from torch import nn
from training import Training, plain
from transformers import BertConfig, BertForSequenceClassification

from surgery import patched, stats

WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_dropout 0.1": {},
    "mixout": {"mixout": 0.7},
    "anchor": {"anchor": 0.01},
    "both": {"mixout": 0.7, "anchor": 0.01},
}


def make(shape: dict[str, int], rank: int) -> nn.Module:
    base = BertForSequenceClassification(BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return get_peft_model(base, LoraConfig(r=rank, target_modules=["query", "value"], lora_dropout=0.1))


def way(model: nn.Module, name: str) -> AbstractContextManager[Any]:
    """Give LoRA its dropout, or none, and put the methods on."""
    for path, module in model.named_modules():
        if "lora_dropout" in path and isinstance(module, nn.Dropout):
            module.p = 0.1 if "dropout" in name else 0.0
    return patched(model, **WAYS[name]) if WAYS[name] else nullcontext()


def time_steps(training: Training, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Interleave the ways, of which one step goes untimed after each change; return seconds, and bytes of w_pre."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    kept = dict.fromkeys(WAYS, 0)
    for _ in range(rounds):
        for name in WAYS:
            with way(training.model, name):
                training.step(plain, training.model)
                seconds[name] += (training.step(plain, training.model) for _ in range(2))
                kept[name] = stats(training.model)["w_pre_bytes"] if WAYS[name] else 0
    return seconds, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="two small layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    logging.getLogger("surgery").setLevel(logging.ERROR)  # it warns that the model comes from no checkpoint
    shape, batch = (LARGE, (32, 128)) if arguments.device == "cuda" else (BASE, (16, 128))
    shape = TINY if arguments.quick else shape
    training = Training(lambda: make(shape, arguments.rank), batch, arguments.device)
    seconds, kept = time_steps(training, arguments.rounds)
    what = "bf16 autocast" if arguments.device == "cuda" else f"float32, {torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {arguments.device}, {what}, {batch[0]} x {batch[1]} tokens, rank {arguments.rank}"
    )
    print(f"{'':20}{'median s':>10}{'best s':>10}{'x lora':>10}{'x best':>10}{'w_pre B':>10}")
    reference = seconds["lora"]
    for name, values in seconds.items():
        median, best = statistics.median(values), min(values)
        ratios = f"{median / statistics.median(reference):10.3f}{best / min(reference):10.3f}"
        print(f"{name:20}{median:10.3f}{best:10.3f}{ratios}{kept[name]:10}")


if __name__ == "__main__":
    main()
