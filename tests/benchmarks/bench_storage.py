"""Time `surgery perturb` from S3 to S3 beside a copy of the same bytes by s3fs, from S3 to a disk and back, in one run.

The server is moto's, on the loopback, in a process of its own, which shares the cores with both. It is made to keep
objects as bytes: moto itself reads and copies the whole of one for each range that is asked for.

    python tests/benchmarks/bench_storage.py [--quick] [--rounds N] [--folder DIR]
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import Run, measure, parse_arguments, summarize
from safetensors.numpy import save_file

_SETTINGS = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
SERVE = """
import sys
from moto.s3.models import FakeKey
from moto.server import main

stored = FakeKey.value


def read(key):
    if "as_bytes" not in key.__dict__:
        key.as_bytes = stored.fget(key)
    return key.as_bytes


def write(key, value):
    key.__dict__.pop("as_bytes", None)
    stored.fset(key, value)


FakeKey.value = property(read, write)
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""
WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bench_storage import write_checkpoint
write_checkpoint(Path(sys.argv[2]), int(sys.argv[3]))
"""
PUT = """
import sys, s3fs
fs = s3fs.S3FileSystem()
fs.mkdir("bench")
fs.put(sys.argv[1] + "/", "bench/source/", recursive=True)
"""
COPY = """
import sys, tempfile, s3fs
fs = s3fs.S3FileSystem()
with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
    fs.get("bench/source/", folder + "/", recursive=True)
    fs.put(folder + "/", "bench/copy/", recursive=True)
"""
CLEAR = """
import s3fs
fs = s3fs.S3FileSystem()
for folder in ("bench/out", "bench/copy"):
    if fs.exists(folder):
        fs.rm(folder, recursive=True)
"""


@contextmanager
def serving() -> Iterator[None]:
    """Run an S3 server, and have every process from here on find it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        os.environ.update(_SETTINGS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
        try:
            _await(port)
            yield
        finally:
            server.kill()


def _await(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("the server does not start")


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write three shards of Llama's matrices, 50 MB a layer: moto takes long for 2 GB."""
    rng, weight_map = np.random.default_rng(0), {}
    folder.mkdir()
    for number in (1, 2, 3):
        name, weights = f"model-{number:05}-of-00003.safetensors", {}
        for layer in range(layers):
            stem = f"model.layers.{number * layers + layer}"
            for matrix, shape in (("up_proj", (5632, 2048)), ("down_proj", (2048, 5632)), ("q_proj", (2048, 2048))):
                w = 0.02 * rng.standard_normal(shape, dtype=np.float32)
                weights[f"{stem}.mlp.{matrix}.weight"] = w.astype(np.float16)
            weights[f"{stem}.input_layernorm.weight"] = 1 + 0.1 * rng.standard_normal(2048).astype(np.float16)
        save_file(weights, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def show(nbytes: int, runs: dict[str, list[Run]], rounds: int) -> None:
    print(f"\n{nbytes / 1e9:.2f} GB float16, S3 on the loopback, {os.cpu_count()} cores, medians of {rounds} rounds")
    print(f"{'':26}{'seconds':>9}{'best':>8}{'peak MB':>9}{'x s3fs':>8}")
    seconds = summarize(runs["s3fs, there and back"])[0]
    for name, results in runs.items():
        median, fastest, peak = summarize(results)
        print(f"{name:26}{median:9.2f}{fastest:8.2f}{peak:9.0f}{median / seconds:8.2f}")


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(dir=args.folder) as work, serving():
        source = Path(work) / "source"
        write = [sys.executable, "-c", WRITE, str(Path(__file__).parent), str(source), "1" if args.quick else "4"]
        subprocess.run(write, check=True)  # a child's peak memory starts at what its parent held
        nbytes = sum(path.stat().st_size for path in source.iterdir())
        subprocess.run([sys.executable, "-c", PUT, str(source)], check=True)
        cache = ["env", f"XDG_CACHE_HOME={work}/cache"]
        surgery = [*cache, sys.executable, "-m", "surgery"]
        ways = {
            "s3fs, there and back": [sys.executable, "-c", COPY, work],
            "surgery perturb": [*surgery, "perturb", "s3://bench/source", "-o", "s3://bench/out"],
            "surgery verify": [*surgery, "verify", "s3://bench/out"],
        }
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            subprocess.run([sys.executable, "-c", CLEAR], check=True)
            for name, command in ways.items():
                runs[name].append(measure(command))
        show(nbytes, runs, args.rounds)


if __name__ == "__main__":
    main()
