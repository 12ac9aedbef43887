"""Mutated indexes of sharded checkpoints, of safetensors or PyTorch files, planned with the shards beside them."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mutations import mutate_json, spell_json
from outcomes import FindingError, Refused
from safetensors.numpy import save_file

from surgery.noisytune import NoisyTune
from surgery.perturb.plan import make_plan

_NAMES = (("a.weight", "a.bias"), ("b.weight", "lm_head.weight"))


class Indexes:
    stem, suffix = "model", ".safetensors"

    def __init__(self, folder: Path) -> None:
        self._out = folder / "out"
        source = folder / "source"
        source.mkdir()
        for number, names in enumerate(_NAMES, 1):
            self._write_shard(source / self._shard(number), {name: np.eye(4, dtype=np.float32) for name in names})
        self._path = source / f"{self.stem}{self.suffix}.index.json"

    def _shard(self, number: int) -> str:
        return f"{self.stem}-{number:05}-of-00002{self.suffix}"

    def _write_shard(self, path: Path, weights: dict[str, np.ndarray]) -> None:
        save_file(weights, path)

    def write(self, r: Random) -> None:
        weight_map = {name: self._shard(number) for number, names in enumerate(_NAMES, 1) for name in names}
        index = {"metadata": {"total_size": 256}, "weight_map": weight_map}
        self._path.write_bytes(spell_json(r, mutate_json(r, index) if r.random() < 0.9 else index))

    def read(self) -> Any:
        return make_plan(self._path.parent, self._out, NoisyTune())

    def judge(self, ours: Any) -> str:
        if isinstance(ours, Refused):
            return "refused"
        planned = {tensor.name for shard in ours.shards for tensor in shard.header.tensors}
        named = json.loads(self._path.read_bytes())["weight_map"].keys() - {"lm_head.weight"}
        if not named <= planned:
            raise FindingError(f"planned without {named - planned}")
        for name, data in ours.indexes.items():
            if not json.loads(data)["weight_map"].keys() - {"lm_head.weight"} <= planned:
                raise FindingError(f"writes another index: {name}")
        return "planned"


class PickledIndexes(Indexes):
    stem, suffix = "pytorch_model", ".bin"

    def _write_shard(self, path: Path, weights: dict[str, np.ndarray]) -> None:
        import torch

        torch.save({name: torch.from_numpy(w) for name, w in weights.items()}, path)
