"""Time `surgery perturb` beside cp and beside what people do without it, in one run: wall, peak memory, ratio to cp.

Every way starts with the source in the page cache and ends with the output on the disk (sync). Rounds are interleaved,
because a shared disk drifts; the table shows medians.

    python tests/benchmarks/bench_perturb.py [--quick] [--rounds N] [--folder DIR]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def make_checkpoint(folder: Path, *, hidden: int, layers: int, inner: int, kv: int, vocab: int) -> int:
    """Write a Llama-shaped bf16 checkpoint with transformers; return its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, vocab_size=vocab,
        num_attention_heads=hidden // 64, num_key_value_heads=kv // 64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    total = sum(p.numel() * 2 for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=total // 3 + total // 20)
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(command: list[str], out: Path, source: Path) -> tuple[float, float]:
    """Run a command from a warm cache to a synced disk; return seconds and peak resident MB."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    subprocess.run(f"cat {source}/* > /dev/null", shell=True, check=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {command}")
    return seconds, usage.ru_maxrss / 1024


def check(source: Path, out: Path) -> None:
    """Compare the output of `surgery perturb` with the paper's formula: bounds, spread, and every other file."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a 50 MB checkpoint instead of 2.2 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    shape = (
        {"hidden": 512, "layers": 4, "inner": 1408, "kv": 128, "vocab": 16000}
        if args.quick
        else {"hidden": 2048, "layers": 22, "inner": 5632, "kv": 256, "vocab": 32000}
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        source, out = Path(work) / "source", Path(work) / "out"
        nbytes = make_checkpoint(source, **shape)
        shards = len(list(source.glob("*.safetensors")))
        surgery = [sys.executable, "-m", "surgery", "perturb", str(source), "-o", str(out)]
        ways = {
            "cp -r": ["cp", "-r", str(source), str(out)],
            "surgery perturb": surgery,
            "safetensors loop": [sys.executable, "-c", SAFETENSORS_LOOP, str(source), str(out)],
            "transformers loop": [sys.executable, "-c", TRANSFORMERS_LOOP, str(source), str(out)],
        }
        measure(surgery, out, source)  # compiles the kernels, once per machine
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, command in ways.items():
                runs[name].append(measure(command, out, source))
                if name == "surgery perturb":
                    check(source, out)
                if name == "cp -r":
                    runs[name].append(measure(command, out, source))
        print(f"{nbytes / 1e9:.2f} GB bf16 in {shards} shards, {os.cpu_count()} cores, warm cache, synced, "
              f"medians of {args.rounds} rounds")  # fmt: skip
        print(f"{'':20}{'seconds':>9}{'best':>8}{'peak MB':>9}{'x cp':>7}")
        base = statistics.median(seconds for seconds, _ in runs["cp -r"])
        for name, results in runs.items():
            seconds = statistics.median(s for s, _ in results)
            print(f"{name:20}{seconds:9.2f}{min(s for s, _ in results):8.2f}{max(m for _, m in results):9.0f}{seconds / base:7.2f}")


if __name__ == "__main__":
    main()
