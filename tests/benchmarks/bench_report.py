"""Time inspect, diff and verify beside cat and perturb, in one run: wall, peak memory, ratio to what each is held to.

Every way starts with its files in the page cache. Rounds are interleaved; the table shows medians and the best, and
ratios of the best: other work on the machine only ever adds.

    python tests/benchmarks/bench_report.py [--quick] [--rounds N] [--folder DIR]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import Run, make_checkpoint, measure, parse_arguments, summarize, warm

LAM, SEED = 0.15, 0


@dataclass(frozen=True)
class Way:
    """One command, and the one whose time it is held against."""

    name: str
    command: list[str]
    against: str
    writes: Path | None = None


CHECK = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bench_report import check
check(*map(Path, sys.argv[2:]))
"""


def check(a: Path, b: Path, inspected: Path, compared: Path) -> None:
    """Compare the figures reported for some tensors with torch's.

    Run in a process of its own: a child's peak memory starts at what its parent held.
    """
    from safetensors import safe_open

    stats = {tensor["name"]: tensor for tensor in json.loads(inspected.read_text())["tensors"]}
    differences = json.loads(compared.read_text())
    assert differences["recipe"]["agrees"], differences["recipe"]["disagreeing"]
    figures = {tensor["name"]: tensor for tensor in differences["tensors"]}
    for path in a.glob("*.safetensors"):
        with safe_open(path, "pt") as before, safe_open(b / path.name, "pt") as after:
            for name in list(before.keys())[:4]:
                w, noisy = before.get_tensor(name).double(), after.get_tensor(name).double()
                d, found, figure = noisy - w, stats[name]["stats"], figures[name]
                assert (found["min"], found["max"], found["nan"]) == (w.min().item(), w.max().item(), 0)
                assert abs(found["std"] - w.std().item()) <= 1e-9 * w.std().item()
                assert figure["max_abs_d"] == d.abs().max().item()
                assert abs(figure["rms_d"] - d.square().mean().sqrt().item()) <= 1e-9 * figure["rms_d"]


def ways(a: Path, b: Path, out: Path) -> list[Way]:
    """Return what is timed."""
    surgery = [sys.executable, "-m", "surgery"]

    def cat(*folders: Path) -> list[str]:
        return ["cat", *(str(path) for folder in folders for path in sorted(folder.glob("*.safetensors")))]

    known = [
        Way("cat A", cat(a), "cat A"),
        Way("cat A B", cat(a, b), "cat A B"),
        Way("surgery perturb", [*surgery, "perturb", str(a), "-o", str(out)], "surgery perturb", writes=out),
        Way("surgery inspect", [*surgery, "inspect", str(a), "--json"], "cat A"),
        Way("surgery inspect --stats", [*surgery, "inspect", str(a), "--stats", "--json"], "cat A"),
        Way("surgery diff", [*surgery, "diff", str(a), str(b), "--json"], "cat A B"),
        Way("surgery verify", [*surgery, "verify", str(b)], "surgery perturb"),
    ]
    help = subprocess.run([*surgery, "--help"], capture_output=True, text=True, check=True).stdout
    return [way for way in known if way.command[:3] != surgery or f" {way.command[3]} " in help]


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        a, b, out = (Path(work) / name for name in ("a", "b", "out"))
        nbytes = make_checkpoint(a, is_small=args.quick)
        subprocess.run(
            [sys.executable, "-m", "surgery", "perturb", str(a), "-o", str(b), "--lam", str(LAM), "--seed", str(SEED)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        timed = ways(a, b, out)
        runs: dict[str, list[Run]] = {way.name: [] for way in timed}
        for round in range(args.rounds + 1):  # the first is not counted
            for way in timed:
                if way.writes:
                    shutil.rmtree(way.writes, ignore_errors=True)
                    os.sync()
                warm(a, b)
                with (Path(work) / f"{way.name}.txt").open("w") as file:
                    stdout = subprocess.DEVNULL if way.name.startswith("cat") else file.fileno()
                    result = measure(way.command, stdout=stdout, syncs=way.writes is not None)
                if round:
                    runs[way.name].append(result)
        printed = [str(Path(work) / f"surgery {name}.txt") for name in ("inspect --stats", "diff")]
        here = str(Path(__file__).parent)
        subprocess.run([sys.executable, "-c", CHECK, here, str(a), str(b), *printed], check=True)
        shards = len(list(a.glob("*.safetensors")))
        print(
            f"{nbytes / 1e9:.2f} GB bf16 in {shards} shards, {os.cpu_count()} cores, warm cache, {args.rounds} rounds"
        )
        print(f"{'':26}{'seconds':>9}{'best':>8}{'peak MB':>9}{'ratio':>8}  to")
        best = {name: summarize(results)[1] for name, results in runs.items()}
        for way in timed:
            seconds, fastest, peak = summarize(runs[way.name])
            print(
                f"{way.name:26}{seconds:9.2f}{fastest:8.2f}{peak:9.0f}{fastest / best[way.against]:8.2f}  {way.against}"
            )


if __name__ == "__main__":
    main()
