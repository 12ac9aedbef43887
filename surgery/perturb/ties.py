"""Find tied embeddings that a checkpoint stores twice, by equal bytes, so that both copies get equal noise.

transformers writes tied weights once, but other tools write them under each name. With a noise of their own each, they
would no longer be equal, and the model would load untied or with half of its noise lost.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.tied_names import rank
from surgery.checkpoint.weight_file import WeightFile
from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.perturb.plan import ShardPlan

_CHUNK = 1 << 20


def find_ties(shards: Sequence["ShardPlan"], open_source: Callable[[str], WeightFile]) -> dict[str, dict[str, str]]:
    """Find tensors that repeat another one, bit for bit, under a name that models tie to it.

    Args:
        shards: of the whole checkpoint; tensors are only tied within one folder.
        open_source: opens a shard by its name in the source.
    Returns:
        By shard name: for each name that repeats another, the name whose noise both get.
    Raises:
        SettingError: one of the two is to be perturbed and the other is not.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[tuple[ShardPlan, Tensor]]] = defaultdict(list)
    for shard in shards:
        for tensor in shard.header.tensors:
            if rank(tensor.name) and tensor.size > 1:
                groups[shard.name.rpartition("/")[0], tensor.dtype, tensor.shape].append((shard, tensor))
    ties: dict[str, dict[str, str]] = defaultdict(dict)
    for members in groups.values():
        members.sort(key=lambda member: (rank(member[1].name), member[1].name))
        while len(members) > 1:
            (shard, tensor), *others = members
            equal = [other for other in others if _are_equal((shard, tensor), other, open_source)]
            for other_shard, other in equal:
                _refuse_half(shard, tensor, other_shard, other)
                ties[other_shard.name][other.name] = tensor.name
            members = [other for other in others if other not in equal]
    return ties


def _are_equal(
    one: tuple["ShardPlan", Tensor], other: tuple["ShardPlan", Tensor], open_source: Callable[[str], WeightFile]
) -> bool:
    """Compare two tensors' bytes, up to the first piece that differs."""
    sources = [open_source(shard.source) for shard, _ in (one, other)]
    try:
        for start in range(0, one[1].nbytes, _CHUNK):
            pieces = [bytearray(min(_CHUNK, one[1].nbytes - start)) for _ in sources]
            for source, (_, tensor), piece in zip(sources, (one, other), pieces, strict=True):
                source.read_into(tensor, start, memoryview(piece))
            if pieces[0] != pieces[1]:
                return False
        return True
    finally:
        for source in sources:
            source.close()


def _refuse_half(shard: "ShardPlan", tensor: Tensor, other_shard: "ShardPlan", other: Tensor) -> None:
    if (tensor.name in shard.copied) != (other.name in other_shard.copied):
        raise SettingError(
            f"{other.name}: expected the same for it and for {tensor.name}, to which it is tied, got only one of them "
            "to perturb. Include or exclude both."
        )
