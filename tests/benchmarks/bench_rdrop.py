"""Time R-Drop's loss, forward and backward, beside plain cross entropy and the authors' snippet; and its peak memory.

One tensor of logits, both passes one after the other, goes through all ways in turn, so that every ratio is of one run.
The snippet is that of the README of the paper's authors, re-derived: two cross entropies, and F.kl_div both ways from
a log_softmax and a softmax of each. Memory is that of a process of its own for each way: the peak above the logits.

Then a whole training step, see rdrop_step.py, and one through TRL's fused head, see fused_step.py.

    python tests/benchmarks/bench_rdrop.py [--device cuda] [--quick] [--rounds N] [--part loss|step|fused]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fused_step import report_fused_steps
from rdrop_step import report_steps
from torch.nn import functional as F  # noqa: N812

from surgery.hooks.rdrop.divergence import cross_entropy
from surgery.hooks.rdrop.objective import Objective

ALPHA = 1.0


def plain(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target)


def ours(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits, None, target, Objective(ALPHA)).loss


def snippet(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    a, b = logits.chunk(2)
    y = target[: len(a)]
    ce = 0.5 * (F.cross_entropy(a, y) + F.cross_entropy(b, y))
    p_loss = F.kl_div(F.log_softmax(a, dim=-1), F.softmax(b, dim=-1), reduction="none").sum()
    q_loss = F.kl_div(F.log_softmax(b, dim=-1), F.softmax(a, dim=-1), reduction="none").sum()
    # summed over the rows there; divided here, to compare values
    return ce + ALPHA / 2 * (p_loss + q_loss) / 2 / len(y)


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "plain cross_entropy": plain,
    "ours": ours,
    "authors' snippet": snippet,
}


class Logits:
    """The tensor that all ways take, and the step that is timed."""

    def __init__(self, rows: int, columns: int, device: str) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.logits = torch.randn(rows, columns, device=device, dtype=dtype).requires_grad_()
        self.target = torch.randint(0, columns, (rows // 2,), device=device).repeat(2)
        self.device = device

    def step(self, way: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        """Return the seconds of forward and backward."""
        self.logits.grad = None
        start = self._now()
        way(self.logits, self.target).backward()
        return self._now() - start

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self, name: str) -> int:
        """Return by how many bytes two steps raise the peak."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = self._held(reset=True)
        for _ in range(2):
            self.step(WAYS[name])
        return self._held() - before

    def _held(self, *, reset: bool = False) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def time_loss(data: Logits, rounds: int) -> dict[str, list[float]]:
    """Interleave the ways; the first round goes untimed."""
    seconds: dict[str, list[float]] = {}
    for round_ in range(rounds + 1):
        for name, way in WAYS.items():
            taken = data.step(way)
            if round_:
                seconds.setdefault(name, []).append(taken)
    return seconds


def check(data: Logits) -> None:
    """Compare value and gradient with the snippet's, on logits few enough for float64."""
    few = data.logits.detach().unflatten(0, (2, -1))[:, :8].flatten(0, 1)
    target = data.target[:8].repeat(2)
    inputs = few.clone().requires_grad_(), few.double().requires_grad_()
    losses = ours(inputs[0], target), snippet(inputs[1], target)
    for got, want in zip((losses[0], *torch.autograd.grad(losses[0], inputs[0])),
                         (losses[1], *torch.autograd.grad(losses[1], inputs[1])), strict=True):  # fmt: skip
        torch.testing.assert_close(got, want.to(got.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="256 rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["loss", "step", "fused"], help="default: both")
    parser.add_argument("--peak", help="measure the peak memory of this way only")
    arguments = parser.parse_args()
    if arguments.part in (None, "loss"):
        measure_loss(arguments)
    if arguments.part in (None, "step") and not arguments.peak:
        report_steps(arguments.device, arguments.rounds)
    if arguments.part in (None, "fused") and not arguments.peak:
        report_fused_steps(arguments.device, arguments.rounds)


def measure_loss(arguments: argparse.Namespace) -> None:
    """Print the table of the loss; with --peak one way's peak only."""
    rows, columns = 256 if arguments.quick else 4096, 128256 if arguments.device == "cuda" else 32000
    data = Logits(rows, columns, arguments.device)
    if arguments.peak:
        print(data.peak(arguments.peak))
        return
    seconds = time_loss(data, arguments.rounds)
    check(data)
    what = f"torch {torch.__version__}, {data.logits.dtype}, {rows} x {columns}, {data.logits.nbytes / 1e6:.0f} MB"
    del data
    # else glibc keeps what is freed for another time, and the peak is as much its habits as the loss's needs
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, *sys.argv, "--peak"]
    peaks = {name: int(subprocess.check_output([*command, name], env=environment)) for name in WAYS}
    report(f"{what}, {arguments.device}, {torch.get_num_threads()} threads", seconds, peaks)


def report(title: str, seconds: dict[str, list[float]], peaks: dict[str, int]) -> None:
    reference, memory = statistics.median(seconds["plain cross_entropy"]), peaks["plain cross_entropy"]
    print(f"loss, forward and backward: {title}")
    print(f"{'':20}{'median s':>10}{'best s':>10}{'worst s':>10}{'x plain':>10}{'peak MB':>10}{'x plain':>10}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:20}{median:10.3f}{min(values):10.3f}{max(values):10.3f}{median / reference:10.2f}"
            f"{peaks[name] / 1e6:10.0f}{peaks[name] / memory:10.2f}"
        )


if __name__ == "__main__":
    main()
