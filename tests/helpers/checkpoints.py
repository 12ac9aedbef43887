"""Seeded tiny checkpoints, and digests of whole folders."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]


def tree_digest(root: Path, *, skip: str = "") -> dict[str, str]:
    """Sha256 of every file below `root`, or where it links to, by name; folders too."""
    digests = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if skip and name.split("/")[0] == skip:
            continue
        if path.is_symlink():
            digests[name] = f"link to {path.readlink()}"
        elif path.is_file():
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            digests[name] = "folder" if path.is_dir() else "special"
    return digests


def tensors(seed: int = 0, names: tuple[str, ...] = ("dense.weight", "dense.bias", "out.weight")) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {"bias": (8,), "weight": (16, 8)}
    return {name: rng.standard_normal(shapes[name.rpartition(".")[2]]).astype(np.float32) for name in names}


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def write_weights(path: Path, seed: int = 0, **kwargs: Any) -> Tensors:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = tensors(seed, **kwargs)
    save_file(written, path, metadata={"format": "pt"})
    return written


def write_sharded(folder: Path, *, stem: str = "model") -> Tensors:
    """Write three shards with their index."""
    weight_map = {}
    everything: Tensors = {}
    for number in (1, 2, 3):
        shard = f"{stem}-{number:05}-of-00003.safetensors"
        names = (f"layer.{number}.weight", f"layer.{number}.bias")
        everything |= write_weights(folder / shard, number, names=names)
        weight_map |= dict.fromkeys(names, shard)
    size = sum(array.nbytes for array in everything.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    return everything


def raw_safetensors(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of any header, true or not."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data
