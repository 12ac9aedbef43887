"""Find tied weights that a checkpoint stores twice, by equal bytes, so that both copies get equal noise.

transformers writes tied weights once, but other tools write them under each name. With a noise of their own each, they
would no longer be equal, and the model would load untied or with half of its noise lost. Of all tensors a few bytes are
read, and of those that agree in them all.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.tied_names import LEAST, is_embedding, order
from surgery.checkpoint.weight_file import REQUESTS, RangeReader, WeightFile
from surgery.errors import SettingError
from surgery.escapes import get_logger
from surgery.noisytune import EXCLUDED, NOT_INCLUDED
from surgery.perturb.shard_plan import ShardPlan

_CHUNK = 1 << 20
_SAMPLE = 64  # bytes at the start, in the middle and at the end of a tensor
_log = get_logger(__name__)


class _Member(NamedTuple):
    """A tensor that may be tied, and the shard that it is in."""

    shard: ShardPlan
    tensor: Tensor

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def folder(self) -> str:
        return self.shard.name.rpartition("/")[0]

    @property
    def kind(self) -> tuple[str, str, tuple[int, ...]]:
        """What tensors have in common that may be one: tensors are only tied within one folder."""
        return self.folder, self.tensor.dtype, self.tensor.shape

    @property
    def is_chosen(self) -> bool:
        return self.name not in self.shard.copied


def find_ties(shards: Sequence[ShardPlan], open_source: Callable[[str], WeightFile]) -> dict[str, dict[str, str]]:
    """Find tensors that repeat another one, bit for bit: embeddings, what the class ties, and all that are not small.

    Those that the class ties and that differ are named in a warning: loaders leave them apart.

    Args:
        shards: of the whole checkpoint.
        open_source: opens a shard by its name in the source.
    Returns:
        By shard name: for each name that repeats another, the name whose noise both get.
    Raises:
        SettingError: one of the two is to be perturbed and the other is not.
    """
    members = [_Member(s, t) for s in shards for t in s.header.tensors if _may_be_tied(s, t)]
    ties: dict[str, dict[str, str]] = defaultdict(dict)
    for alike in _sampled(_grouped(members), open_source):
        rest = sorted(alike, key=lambda member: (*order(member.name, member.shard.class_ties), member.name))
        while len(rest) > 1:
            first, *others = rest
            # of another model in this folder, what has the same name has the same noise anyway
            others = [other for other in others if other.name != first.name]
            equal = [other for other in others if _are_one(first, other, open_source)]
            for other in equal:
                _refuse_half(first, other)
                ties[other.shard.name][other.name] = first.name
            rest = [other for other in others if other not in equal]
    _warn_of_untied(members, ties, open_source)
    return ties


def _may_be_tied(shard: ShardPlan, tensor: Tensor) -> bool:
    """Leave out what no noise is meant for, and what may be equal by chance."""
    if shard.copied.get(tensor.name) not in (None, EXCLUDED, NOT_INCLUDED):
        return False
    if tensor.size >= LEAST or is_embedding(tensor.name):
        return tensor.size > 1
    return tensor.size > 1 and (tensor.name in shard.class_ties or tensor.name in shard.class_ties.values())


def _grouped(members: Iterable[_Member]) -> list[list[_Member]]:
    groups: dict[tuple[str, str, tuple[int, ...]], list[_Member]] = defaultdict(list)
    for member in members:
        groups[member.kind].append(member)
    return [group for group in groups.values() if len(group) > 1 and any(member.is_chosen for member in group)]


def _sampled(groups: list[list[_Member]], open_source: Callable[[str], WeightFile]) -> Iterator[list[_Member]]:
    """Cut groups into those that agree in a few bytes of each tensor; each shard is opened once.

    What is one element repeated is left out.
    """
    by_shard: dict[str, list[_Member]] = defaultdict(list)
    for member in (member for group in groups for member in group):
        by_shard[member.shard.source].append(member)
    alike: dict[tuple[object, ...], list[_Member]] = defaultdict(list)
    for name, members in by_shard.items():
        source = open_source(name)
        try:
            for member, sample in zip(members, _samples(source, members), strict=True):
                if not _is_flat(source, member.tensor, sample):
                    alike[*member.kind, sample].append(member)
        finally:
            source.close()
    yield from (group for group in alike.values() if len(group) > 1)


def _samples(source: WeightFile, members: Sequence[_Member]) -> Iterator[bytes]:
    """Yield a sample of each tensor; where each takes a request to a store, several at once."""
    tensors = [member.tensor for member in members]
    if not isinstance(source, RangeReader):
        yield from (_sample(source, tensor) for tensor in tensors)
        return
    with ThreadPoolExecutor(REQUESTS) as pool:
        yield from pool.map(partial(_sample, source), tensors)


def _sample(source: WeightFile, tensor: Tensor) -> bytes:
    length = min(_SAMPLE, tensor.nbytes)
    sample = bytearray(3 * length)
    for number, start in enumerate((0, (tensor.nbytes - length) // 2, tensor.nbytes - length)):
        source.read_into(tensor, start, memoryview(sample)[number * length :][:length])
    return bytes(sample)


def _is_flat(source: WeightFile, tensor: Tensor, sample: bytes) -> bool:
    """Tell whether a tensor is one element repeated: it gets no noise, and others are equal to it by chance."""
    element = sample[: tensor.nbytes // tensor.size]
    if sample != element * (len(sample) // len(element)):
        return False
    piece = bytearray(min(_CHUNK, tensor.nbytes))
    for start in range(0, tensor.nbytes, _CHUNK):
        read = memoryview(piece)[: tensor.nbytes - start]
        source.read_into(tensor, start, read)
        if read != element * (len(read) // len(element)):
            return False
    return True


def _are_one(one: _Member, other: _Member, open_source: Callable[[str], WeightFile]) -> bool:
    return all(piece == its for piece, its in _pairs(one, other, open_source))


def _pairs(
    one: _Member, other: _Member, open_source: Callable[[str], WeightFile]
) -> Iterator[tuple[bytearray, bytearray]]:
    """Yield the bytes of two tensors, a piece of each at a time."""
    sources = [open_source(member.shard.source) for member in (one, other)]
    try:
        for start in range(0, one.tensor.nbytes, _CHUNK):
            pieces = [bytearray(min(_CHUNK, one.tensor.nbytes - start)) for _ in sources]
            for source, member, piece in zip(sources, (one, other), pieces, strict=True):
                source.read_into(member.tensor, start, memoryview(piece))
            yield pieces[0], pieces[1]
    finally:
        for source in sources:
            source.close()


def _refuse_half(first: _Member, other: _Member) -> None:
    if first.is_chosen != other.is_chosen:
        raise SettingError(
            f"{other.name}: expected the same for it and for {first.name}, to which it is tied, got only one of them "
            "to perturb. Include or exclude both."
        )


def _warn_of_untied(
    members: Iterable[_Member], ties: Mapping[str, Mapping[str, str]], open_source: Callable[[str], WeightFile]
) -> None:
    """Name what the class ties and what differs, of each model by itself."""
    named = {(member.folder, member.name): member for member in members}
    apart = []
    for (folder, name), member in named.items():
        other = named.get((folder, member.shard.class_ties.get(name, "")))
        if other and not _share(member, other, ties) and _differ(member, other, open_source):
            apart.append(f"{name} and {other.name}")
    if apart:
        _log.warning(
            "%s: expected equal weights, since the config ties them, got others: each gets its own noise",
            ", ".join(apart),
        )


def _share(one: _Member, other: _Member, ties: Mapping[str, Mapping[str, str]]) -> bool:
    kept = [ties.get(member.shard.name, {}).get(member.name, member.name) for member in (one, other)]
    return kept[0] == kept[1]


def _differ(one: _Member, other: _Member, open_source: Callable[[str], WeightFile]) -> bool:
    return one.kind != other.kind or any(piece != its for piece, its in _pairs(one, other, open_source))
