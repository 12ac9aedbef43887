"""The index of a model's shards: checked against what they hold, and made for the safetensors to write."""

import json
import re
from collections.abc import Collection, Mapping

from surgery.checkpoint.config_files import is_untied
from surgery.checkpoint.layout import WeightSet
from surgery.checkpoint.packed_names import plain_names
from surgery.checkpoint.resolve import Checkpoint
from surgery.checkpoint.roles import read_model_type
from surgery.checkpoint.shards import read_weight_map
from surgery.checkpoint.tied_names import may_be_dropped
from surgery.errors import SourceError
from surgery.files import read_file
from surgery.perturb.shard_plan import ShardPlan


def plan_index(checkpoint: Checkpoint, weight_set: WeightSet, members: list[ShardPlan]) -> dict[str, bytes]:
    """Check a set's index against its shards, and return the index to write, by name."""
    where: dict[str, ShardPlan] = {}
    for shard in members:
        for tensor in shard.header.tensors:
            if other := where.get(tensor.name):
                raise SourceError(
                    f"{checkpoint.label(shard.source)}: expected each tensor in one shard, got {tensor.name!r} also in "
                    f"{other.source}. Remove the stale one."
                )
            where[tensor.name] = shard
    if not weight_set.index:
        return {}
    index = checkpoint.path(weight_set.index)
    weight_map = read_weight_map(index)
    tied = {name for shard in members for name in shard.tied}
    for name, file in _expected(weight_map, checkpoint).items():
        found = where.get(name)
        if found is None and _may_be_dropped(checkpoint, weight_set.folder, name, where):
            continue  # older versions of transformers listed what they then did not save
        if name not in tied and (found is None or found.source.rpartition("/")[2] != file.rpartition("/")[2]):
            raise SourceError(
                f"{checkpoint.label(weight_set.index)}: expected tensor {name!r} in {file}, got no such tensor. "
                "Fetch the checkpoint again."
            )
    if not (weight_set.is_pickle or checkpoint.dequantize):
        return {weight_set.index: read_file(index)}
    document = json.loads(read_file(index))
    document["weight_map"] = {name: shard.name.rpartition("/")[2] for name, shard in sorted(where.items())}
    if checkpoint.dequantize:
        nbytes = sum(tensor.nbytes for shard in members for tensor in shard.header.tensors)
        document["metadata"] = document.get("metadata", {}) | {"total_size": nbytes}
    name = re.sub(r"pytorch_model(.*)\.bin\.index", r"model\1.safetensors.index", weight_set.index)
    return {name: (json.dumps(document, indent=2) + "\n").encode()}


def _expected(weight_map: Mapping[str, str], checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return what an index says of the tensors that are there once weights have been dequantized, if they are."""
    if not checkpoint.dequantize:
        return weight_map
    return {plain: weight_map[name] for name, plain in plain_names(weight_map).items()}


def _may_be_dropped(checkpoint: Checkpoint, folder: str, name: str, stored: Collection[str]) -> bool:
    """Tell whether a tensor need not be stored, for it is tied to one that is: its class says so, or else its name."""
    model_type = read_model_type(checkpoint, folder)
    if model_type and model_type.is_tied and model_type.find_ties(stored, [name]):
        return True
    return may_be_dropped(name, stored) and not is_untied(checkpoint, folder)
