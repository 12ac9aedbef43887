"""What the benchmarks share: a model-shaped checkpoint, and the wall time and peak memory of a command."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

MAKE_CHECKPOINT = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, sys.argv[3]))
model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[2])))
total, shards = sum(p.nbytes for p in model.parameters()), int(sys.argv[4])
model.save_pretrained(sys.argv[1], max_shard_size=total // shards + total // 20)
"""
_SMALL = {"hidden": 512, "layers": 4, "inner": 1408, "kv": 128, "vocab": 16000}
_LARGE = {"hidden": 2048, "layers": 22, "inner": 5632, "kv": 256, "vocab": 32000}

Run = tuple[float, float]
"""Seconds, and peak resident MB."""


def parse_arguments(description: str) -> argparse.Namespace:
    """Read --quick, --rounds and --folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a 50 MB checkpoint instead of 2.2 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    return parser.parse_args()


def make_checkpoint(folder: Path, *, is_small: bool, dtype: str = "bfloat16", shards: int = 3) -> int:
    """Write a Llama-shaped checkpoint with transformers, in a process of its own; return its bytes.

    In float32 it has half the layers, for as many bytes.
    """
    shape = _SMALL if is_small else _LARGE
    config = {
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"] // (2 if dtype == "float32" else 1),
        "intermediate_size": shape["inner"],
        "vocab_size": shape["vocab"],
        "num_attention_heads": shape["hidden"] // 64,
        "num_key_value_heads": shape["kv"] // 64,
        "tie_word_embeddings": False,
    }
    command = [sys.executable, "-c", MAKE_CHECKPOINT, str(folder), json.dumps(config), dtype, str(shards)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(command: list[str], *, stdout: int = subprocess.DEVNULL, syncs: bool = False) -> Run:
    """Run a command to its end, and if it writes until the disk has it all; return wall seconds and peak MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=stdout)
    _, status, usage = os.wait4(process.pid, 0)
    if syncs:
        os.sync()
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {command}")
    return seconds, usage.ru_maxrss / 1024


def warm(*folders: Path) -> None:
    """Bring files into the page cache."""
    for folder in folders:
        subprocess.run(f"cat {folder}/* > /dev/null", shell=True, check=True)


def summarize(runs: list[Run]) -> tuple[float, float, float]:
    """Return the median and the best seconds, and the greatest peak."""
    return statistics.median(s for s, _ in runs), min(s for s, _ in runs), max(m for _, m in runs)
