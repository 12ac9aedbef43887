"""Time `surgery perturb` beside cp and beside what people do without it, in one run: wall, peak memory, ratio to cp.

Every way starts with the source in the page cache and ends with the output on the disk (sync). Rounds are interleaved,
because a shared disk drifts; the table shows medians.

`first of a source` also hashes the source, whose digest later runs remember.

    python tests/benchmarks/bench_perturb.py [--quick] [--rounds N] [--folder DIR]
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Run, make_checkpoint, measure, parse_arguments, summarize, warm

LAM, SEED = 0.15, 0

TRANSFORMERS_LOOP = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
for name, para in model.named_parameters():
    model.state_dict()[name][:] += (torch.rand(para.size()) - 0.5) * 0.15 * torch.std(para)
model.save_pretrained(sys.argv[2], max_shard_size="800MB")
"""

SAFETENSORS_LOOP = """
import sys, torch, shutil
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
source, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
for path in source.iterdir():
    if path.suffix != ".safetensors":
        shutil.copy(path, out)
        continue
    tensors = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():
            w = file.get_tensor(name)
            tensors[name] = w + ((torch.rand(w.shape) - 0.5) * 0.15 * torch.std(w.float())).to(w.dtype)
        save_file(tensors, out / path.name, metadata=file.metadata())
"""


CHECK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from bench_perturb import check
check(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def check(source: Path, out: Path) -> None:
    """Compare the output of `surgery perturb` with the paper's formula: bounds, spread, and every other file.

    Run in a process of its own: a child's peak memory starts at what its parent held.
    """
    import torch
    from safetensors import safe_open

    recipe = json.loads((out / "surgery.json").read_text())
    for shard in recipe["files"]:
        with safe_open(source / shard["name"], "pt") as before, safe_open(out / shard["name"], "pt") as after:
            for tensor in shard["tensors"][:4]:
                if not tensor["perturbed"]:
                    continue
                w, noisy = before.get_tensor(tensor["name"]), after.get_tensor(tensor["name"])
                change, std = noisy.double() - w.double(), w.double().std()
                assert abs(std.item() - float.fromhex(tensor["std"])) < 1e-9 * std.item()
                assert change.abs().max() <= LAM / 2 * std + w.double().abs().max() * 2**-8
                assert torch.isclose(change.std() / std, torch.tensor(LAM / 12**0.5, dtype=torch.float64), rtol=0.05)
    for path in source.iterdir():
        assert (out / path.name).stat().st_size == path.stat().st_size, path.name


def run(command: list[str], out: Path, source: Path) -> Run:
    """Run a command that writes `out`, from a warm cache to a synced disk."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    warm(source)
    return measure(command, syncs=True)


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        source, out = Path(work) / "source", Path(work) / "out"
        nbytes = make_checkpoint(source, is_small=args.quick)
        shards = len(list(source.glob("*.safetensors")))
        surgery = [sys.executable, "-m", "surgery", "perturb", str(source), "-o", str(out)]
        forget = ["env", f"XDG_CACHE_HOME={work}/cache", f"NUMBA_CACHE_DIR={work}/kernels"]
        ways = {
            "cp -r": ["cp", "-r", str(source), str(out)],
            "surgery perturb": surgery,
            "  first of a source": [*forget, *surgery],
            "safetensors loop": [sys.executable, "-c", SAFETENSORS_LOOP, str(source), str(out)],
            "transformers loop": [sys.executable, "-c", TRANSFORMERS_LOOP, str(source), str(out)],
        }
        for name in ("surgery perturb", "  first of a source"):
            run(ways[name], out, source)  # compiles the kernels, once per machine
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, command in ways.items():
                shutil.rmtree(f"{work}/cache", ignore_errors=True)
                runs[name].append(run(command, out, source))
                if name == "surgery perturb":
                    here = str(Path(__file__).parent)
                    subprocess.run([sys.executable, "-c", CHECK, str(source), str(out), here], check=True)
        print(
            f"{nbytes / 1e9:.2f} GB bf16 in {shards} shards, {os.cpu_count()} cores, warm cache, synced, "
            f"medians of {args.rounds} rounds"
        )
        print(f"{'':22}{'seconds':>9}{'best':>8}{'peak MB':>9}{'x cp':>7}")
        base = statistics.median(seconds for seconds, _ in runs["cp -r"])
        for name, results in runs.items():
            seconds, best, peak = summarize(results)
            print(f"{name:22}{seconds:9.2f}{best:8.2f}{peak:9.0f}{seconds / base:7.2f}")


if __name__ == "__main__":
    main()
