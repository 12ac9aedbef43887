"""Time a training step with Mixout, the anchor or RecAdam beside dropout and a straight MixLinear; and its peak memory.

One BERT-shaped model and one AdamW go through all ways in turn, step by step, so that every ratio is of one run. The
straight way is the authors' layer re-derived from its formula: a mask value for each row of inputs, repeated, a clone
and five elementwise passes. Memory is that of a process of its own for each way: the peak above the plain step's, in
units of the bytes of its w_pre. RecAdam is timed while it recalls: later it costs nothing.

    python tests/benchmarks/bench_weights.py [--device cuda] [--compile] [--quick] [--rounds N]
"""

import argparse
import contextlib
import logging
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from training import Training, plain
from transformers import BertConfig, BertForSequenceClassification

from surgery import Mixout, RecAdam, patched, stats

P = 0.7
BASE = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}


class _Straight(torch.autograd.Function):
    """The authors' mixout: every elementwise pass makes a tensor of the weight's size, and all of them are kept."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, w_pre: torch.Tensor) -> torch.Tensor:
        out = w.clone()
        ctx.mask = w.new_empty(1, w.shape[1]).bernoulli_(1 - P).repeat(w.shape[0], 1)
        return ((1 - ctx.mask) * w_pre + ctx.mask * out - P * w_pre) / (1 - P)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.mask, None


class StraightMixLinear(nn.Linear):
    """nn.Linear with the weight mixed in its forward."""

    w_pre: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _Straight.apply(self.weight, self.w_pre) if self.training else self.weight, self.bias)


@contextlib.contextmanager
def dropout(model: nn.Module, p: float) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    yield model


@contextlib.contextmanager
def straight(model: nn.Module, memory: dict[int, torch.Tensor]) -> Iterator[nn.Module]:
    """Turn every nn.Linear into a StraightMixLinear, and back."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = StraightMixLinear
        layer.w_pre = memory.setdefault(id(layer), layer.weight.detach().clone())
    with dropout(model, 0):
        yield model
    for layer in layers:
        layer.__class__ = nn.Linear
        del layer.__dict__["w_pre"]


def ways(model: nn.Module) -> dict[str, Callable[[], Any]]:
    memory: dict[int, torch.Tensor] = {}
    return {
        "no dropout": lambda: dropout(model, 0),
        "dropout 0.1": lambda: dropout(model, 0.1),
        "mixout neuron": lambda: patched(model, mixout=P),
        "mixout element": lambda: patched(model, mixout=Mixout(P, granularity="element")),
        "anchor": lambda: patched(model, anchor=0.01),
        "recadam": lambda: patched(model, recadam=RecAdam(5000.0, t0=1e9)),
        "straight MixLinear": lambda: straight(model, memory),
    }


def prepare(training: Training, *, compiles: bool) -> Any:
    """Return the model as it is now, compiled afresh if asked to: hooks are not looked for later."""
    if not compiles:
        return training.model
    torch._dynamo.reset()
    return torch.compile(training.model)


def time_steps(training: Training, rounds: int, *, compiles: bool) -> dict[str, list[float]]:
    """Interleave the ways; after each change of way, one step goes untimed, and with torch.compile three."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, way in ways(training.model).items():
            with way():
                model = prepare(training, compiles=compiles)
                for _ in range(3 if compiles else 1):
                    training.step(plain, model)
                seconds.setdefault(name, []).extend(training.step(plain, model) for _ in range(2 if rounds > 1 else 1))
    return seconds


def peak(name: str, training: Training, *, compiles: bool) -> tuple[int, int, int]:
    """Run three steps of one way; return peak bytes, and those of w_pre and of the largest mixed layer."""
    with ways(training.model)[name]():
        model = prepare(training, compiles=compiles)
        for _ in range(3):
            training.step(plain, model)
        is_ours = name.split()[0] in ("mixout", "anchor", "recadam")
        mixed = stats(training.model) if is_ours else {"w_pre_bytes": 0}
    largest = max(m.weight.nbytes for m in training.model.modules() if isinstance(m, nn.Linear))
    if training.device == "cuda":
        return torch.cuda.max_memory_allocated(), mixed["w_pre_bytes"], largest
    return high_water(), mixed["w_pre_bytes"], largest


def high_water() -> int:
    """Return the most memory this process has held, in bytes; ru_maxrss would start at what its parent held."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two small layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", help="measure the peak memory of this way only")
    arguments = parser.parse_args()
    logging.getLogger("surgery").setLevel(logging.ERROR)  # it warns that the model comes from no checkpoint
    shape, batch = (LARGE, (32, 128)) if arguments.device == "cuda" else (BASE, (16, 128))
    config = BertConfig(**(TINY if arguments.quick else shape))
    training = Training(lambda: BertForSequenceClassification(config), batch, arguments.device)
    if arguments.peak:
        print(*peak(arguments.peak, training, compiles=arguments.compile))
        return
    seconds = time_steps(training, arguments.rounds, compiles=arguments.compile)
    names = list(seconds)
    del training
    # else glibc keeps what is freed for another time, and the peak is as much its habits as the model's needs
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, *sys.argv, "--peak"]
    peaks = {
        name: tuple(map(int, subprocess.check_output([*command, name], env=environment).split())) for name in names
    }
    report(arguments, batch, seconds, peaks)


def report(
    arguments: argparse.Namespace, batch: tuple[int, int], seconds: dict[str, list[float]], peaks: dict[str, Any]
) -> None:
    what = "bf16 autocast" if arguments.device == "cuda" else f"float32, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {arguments.device}, {what}, {batch[0]} x {batch[1]} tokens, AdamW, p = {P}")
    layer = next(iter(peaks.values()))[2]
    print(f"w_pre of mixout {peaks['mixout neuron'][1] / 1e6:.0f} MB, largest layer {layer / 1e6:.0f} MB")
    print(f"{'':20}{'median s':>10}{'best s':>10}{'x dropout':>11}{'peak MB':>10}{'over plain':>12}{'in w_pre':>10}")
    reference = statistics.median(seconds["dropout 0.1"])
    for name, values in seconds.items():
        median, (bytes_, w_pre, _) = statistics.median(values), peaks[name]
        over = bytes_ - peaks["no dropout"][0]
        print(
            f"{name:20}{median:10.3f}{min(values):10.3f}{median / reference:11.3f}{bytes_ / 1e6:10.0f}"
            f"{over / 1e6:12.0f}{over / (w_pre or peaks['mixout neuron'][1]):10.2f}"
        )


if __name__ == "__main__":
    main()
