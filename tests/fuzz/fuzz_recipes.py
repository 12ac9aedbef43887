"""Mutated recipes: read, written again, and verified beside the checkpoint that one of them made."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mutations import mutate_json, spell_json
from outcomes import FindingError, Refused
from safetensors.numpy import save_file

from surgery.perturb.execute import perturb_checkpoint
from surgery.perturb.verify import verify_checkpoint
from surgery.recipe import Recipe


class Recipes:
    def __init__(self, folder: Path) -> None:
        source, out = folder / "source", folder / "out"
        source.mkdir()
        weights = {"a.weight": np.eye(4, dtype=np.float32), "a.bias": np.ones(3, np.float32), "ids": np.arange(3)}
        save_file(weights, source / "model.safetensors")
        (source / "config.json").write_text("{}")
        perturb_checkpoint(source, out, exclude=["*.bias"])
        self._path = out / "surgery.json"
        self._recipe = json.loads(self._path.read_bytes())

    def write(self, r: Random) -> None:
        recipe = mutate_json(r, self._recipe) if r.random() < 0.95 else self._recipe
        self._path.write_bytes(spell_json(r, recipe))

    def read(self) -> Any:
        recipe = Recipe.read(self._path)
        again = Recipe.from_json(recipe.to_json())
        if again.to_json() != recipe.to_json() or len(recipe.vanished) > len(recipe.tensors):
            raise FindingError("writes another recipe than it read")
        return verify_checkpoint(self._path.parent, workers=1)

    def judge(self, ours: Any) -> str:
        if isinstance(ours, Refused):
            return "refused"
        if any("\n" in fault for fault in ours.faults):
            raise FindingError(f"a fault that is no line: {ours.faults!r:.300}")
        return "verified: equal" if ours.is_equal else "verified: other"
