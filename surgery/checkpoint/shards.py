"""Complete weights with the shards that their indexes name, which must be the checkpoint's own, and there."""

import json
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath

from surgery.checkpoint.layout import Layout, WeightSet
from surgery.errors import SourceError
from surgery.files import read_file


def complete(root: Path, layout: Layout, *, names: Collection[str] | None) -> Layout:
    """Complete the weights with the shards that indexes name, which must be among `names`, or else in `root`."""
    weights = [_with_shards(root, weight_set, names) for weight_set in layout.weights]
    in_indexes = {name for weight_set in weights if weight_set.index for name in weight_set.files}
    # an index may name its shards as it likes, and `arrange` takes those for checkpoints of their own
    weights = [s for s in weights if s.index or not in_indexes.issuperset(s.files)]
    kept = {name for weight_set in weights for name in weight_set.files}
    stale = [name for weight_set in layout.weights for name in weight_set.files if name not in kept]
    left_out = layout.left_out + tuple((name, "a shard that no index names") for name in stale)
    return Layout(tuple(weights), layout.companions, left_out)


def _with_shards(root: Path, weight_set: WeightSet, names: Collection[str] | None) -> WeightSet:
    """Complete a set with the shards its index names, and check that all of them are there."""
    if weight_set.index:
        return replace(weight_set, files=tuple(_shards_of(root, weight_set, names)))
    files = weight_set.files
    counts = {match[1] for name in files if (match := re.search(r"-of-(\d{5})\.", name))}
    if counts and counts != {f"{len(files):05}"}:
        raise SourceError(
            f"{root / files[0]}: expected {int(max(counts))} shards, got {len(files)}. Fetch the missing ones."
        )
    return weight_set


def read_weight_map(path: Path) -> dict[str, str]:
    """Read the weight_map of an index: tensor name to shard, both as written."""
    try:
        weight_map: dict[str, str] = json.loads(read_file(path))["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{path}: expected a JSON index with a weight_map, got another thing. Fetch it again."
        ) from error
    return weight_map


def _shards_of(root: Path, weight_set: WeightSet, names: Collection[str] | None) -> list[str]:
    index = root / str(weight_set.index)
    shards = []
    for shard in sorted(set(read_weight_map(index).values())):
        parts = PurePosixPath(shard).parts
        if (
            PurePosixPath(shard).is_absolute()
            or ".." in parts
            or any(character in shard for character in "\\\0")
            or not shard.endswith(weight_set.suffix)
        ):
            raise SourceError(
                f"{index}: expected shards of its own folder, got {shard!r}. Do not trust this checkpoint."
            )
        name = (PurePosixPath(weight_set.folder) / shard).as_posix()
        # Path's own fails for a name that is too long
        if not os.path.isfile(root / name) if names is None else name not in names:  # noqa: PTH113
            raise SourceError(f"{index}: expected shard {shard}, got no such file. Fetch the missing shard.")
        shards.append(name)
    return shards
