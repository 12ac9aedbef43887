"""Time how `surgery perturb` scales: with cores, with the number of tensors, and with an index of 1 TB.

python tests/benchmarks/bench_scaling.py [--quick] [--rounds N] [--folder DIR]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Run, make_checkpoint, measure, parse_arguments, summarize, warm

SURGERY = [sys.executable, "-m", "surgery"]


MAKE_MANY = """
import sys
import numpy as np
from safetensors.numpy import save_file
rng = np.random.default_rng(0)
names = [f"model.layers.{i // 10}.part{i % 10}.weight" for i in range(int(sys.argv[2]))]
w = {name: rng.normal(size=(32, 32)).astype(np.float32) for name in names}
save_file(w, sys.argv[1], metadata={"format": "pt"})
"""


def make_many(folder: Path, tensors: int) -> None:
    """Write a checkpoint of tensors of 4 kB in one file, in a process of its own, whose memory is not counted."""
    folder.mkdir()
    subprocess.run([sys.executable, "-c", MAKE_MANY, str(folder / "model.safetensors"), str(tensors)], check=True)


def make_sparse(folder: Path, shards: int, tensors: int, side: int) -> None:
    """Write the headers and the index of a checkpoint, and holes in the place of its weights."""
    folder.mkdir()
    weight_map, nbytes = {}, 2 * side * side
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = [f"model.layers.{i}.mlp.experts.{j}.down_proj.weight" for j in range(tensors)]
        header = json.dumps(
            {
                name: {"dtype": "BF16", "shape": [side, side], "data_offsets": [j * nbytes, (j + 1) * nbytes]}
                for j, name in enumerate(names)
            }
        ).encode()
        weight_map |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as shard:
            shard.write(len(header).to_bytes(8, "little") + header)
            shard.truncate(8 + len(header) + tensors * nbytes)
    index = {"metadata": {"total_size": shards * tensors * nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        large, few, many, sparse = (Path(work) / name for name in ("large", "few", "many", "sparse"))
        out = Path(work) / "out"
        nbytes = make_checkpoint(large, is_small=args.quick)
        make_many(few, 10_000)
        make_many(many, 20_000)
        make_sparse(sparse, 200, 25, 10_000)
        cores = sorted(os.sched_getaffinity(0))
        ways = {
            f"{nbytes / 1e9:.2f} GB on {n} core{'s' * (n > 1)}": (
                ["taskset", "-c", ",".join(map(str, cores[:n])), *SURGERY, "perturb", str(large), "-o", str(out)],
                large,
            )
            for n in (1, 2)
            if n <= len(cores)
        }
        for n, path in ((10_000, few), (20_000, many)):
            ways[f"{n:,} tensors of 4 kB"] = ([*SURGERY, "perturb", str(path), "-o", str(out)], path)
        ways["1 TB in 200 shards, --dry-run"] = ([*SURGERY, "perturb", str(sparse), "-o", str(out), "--dry-run"], few)
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, (command, source) in ways.items():
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                warm(source)
                runs[name].append(measure(command, syncs="--dry-run" not in command))
        print(f"warm cache, synced, medians of {args.rounds} rounds\n{'':32}{'seconds':>9}{'best':>8}{'peak MB':>9}")
        for name, results in runs.items():
            seconds, best, peak = summarize(results)
            print(f"{name:32}{seconds:9.2f}{best:8.2f}{peak:9.0f}")


if __name__ == "__main__":
    main()
