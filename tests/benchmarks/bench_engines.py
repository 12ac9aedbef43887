"""Time `--engine ray` on two nodes of this machine against one process: 64 shards of 10 MB; and what 1 TB would take.

python tests/benchmarks/bench_engines.py [--rounds N] [--folder DIR]

"warm": in one Python that has joined the cluster, as a notebook has, from the second run on.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import measure, parse_arguments, warm
from safetensors.numpy import save_file

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from ray_cluster import RayCluster

SHARDS, NBYTES = 64, 10_000_000
WARM = """
import json, shutil, sys, time
from surgery import perturb_checkpoint
from surgery.engines.registry import open_engine
source, out, rounds = sys.argv[1:]
joined = open_engine("ray", logs=None)
took = {"local": [], "ray": []}
for _ in range(int(rounds) + 1):
    for engine, seconds in took.items():
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        perturb_checkpoint(source, out, engine=engine)
        seconds.append(time.perf_counter() - start)
print(json.dumps({engine: seconds[1:] for engine, seconds in took.items()}))
"""


def write_shards(folder: Path) -> None:
    rng, weight_map = np.random.default_rng(0), {}
    folder.mkdir()
    for number in range(1, SHARDS + 1):
        shard, name = f"model-{number:05}-of-{SHARDS:05}.safetensors", f"layer.{number}.weight"
        save_file({name: rng.standard_normal((1250, NBYTES // 5000), dtype=np.float32)}, folder / shard)
        weight_map[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def print_times(what: str, took: dict[str, list[float]]) -> None:
    local, ray = (statistics.median(took[engine]) for engine in ("local", "ray"))
    more = 1000 * (ray - local) / SHARDS
    print(f"{what:14} local {local:.2f} s, ray {ray:.2f} s: {ray / local:.2f} x, {more:+.0f} ms a shard", flush=True)


def simulate(nodes: int, slots: int, *, shard: float, core_ns: float, start: float, disk: float) -> float:
    """Return the seconds that 200 shards take, as their tasks are handed to whichever slot is free.

    Args:
        slots: tasks at once on a node, a core each.
        shard: GB of each.
        core_ns: of one core, a byte.
        start: seconds of a task, before its work.
        disk: GB in a second that a node reads and writes, shared by its tasks; reads and writes count alike.
    """
    free = [0.0] * (nodes * slots)
    for _ in range(200):
        first = free.index(min(free))
        free[first] += start + max(shard * core_ns, 2 * shard / (disk / slots))
    return max(free)


def print_terabyte(core_ns: float, start: float) -> None:
    print(f"1 TB in 200 shards, at {core_ns:.2f} core-ns a byte and {start:.1f} s to start a task, on paper:")
    for nodes in (1, 16):
        for disk in (1.0, 4.0):
            took = simulate(nodes, 16, shard=5.0, core_ns=core_ns, start=start, disk=disk)
            print(f"  {nodes:2} nodes of 16 cores, {disk:.0f} GB/s each: {took / 60:.1f} minutes")


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        source, out = Path(work) / "source", Path(work) / "out"
        write_shards(source)
        warm(source)
        cluster = RayCluster(Path(work) / "cluster.log")
        os.environ["RAY_ADDRESS"] = cluster.address
        took: dict[str, list[float]] = defaultdict(list)
        cores = 0.0
        for _ in range(args.rounds):
            for engine in ("local", "ray"):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                command = [sys.executable, "-m", "surgery", "perturb", str(source), "-o", str(out), "--engine", engine]
                took[engine].append(measure(command)[0])
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                shutil.rmtree(out)
                if engine == "local":
                    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print_times("whole command", took)
        done = subprocess.run(
            [sys.executable, "-c", WARM, str(source), str(out), str(args.rounds)], capture_output=True, check=True
        )
        print_times("warm", json.loads(done.stdout.splitlines()[-1]))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import surgery.perturb.run_task"], check=True)
        print_terabyte(cores * 1e9 / (SHARDS * NBYTES), time.perf_counter() - start)
        cluster.stop()


if __name__ == "__main__":
    main()
