"""How two checkpoints differ, tensor by tensor, whatever files each keeps them in."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.resolve import Checkpoint, resolve
from surgery.checkpoint.tensorfile import Tensor
from surgery.errors import SourceError
from surgery.inspect.comparison import EQUAL, Comparison, Difference
from surgery.inspect.inspection import components, open_all
from surgery.progress import bar

if TYPE_CHECKING:
    from surgery.inspect.scan import Job
    from surgery.inspect.tensor_diff import Pair
    from surgery.perturb.shard import Source


def diff_checkpoints(
    a: str | Path,
    b: str | Path,
    *,
    variant: str | None = None,
    token: str | None = None,
    workers: int | None = None,
) -> Comparison:
    """Compare two checkpoints, tensor by tensor, however each is split into files.

    Args:
        a, b: Hub ids, perhaps with `@revision`, folders, or .safetensors or PyTorch files.
        variant: as in from_pretrained, such as "fp16"; of both.
        token: Hub token; default: the one stored on this machine.
        workers: threads; default: one per core, at most 16.
    Raises:
        SettingError, SourceError: one of them is missing, malformed or unsafe.
    """
    from surgery.inspect.agreement import agree
    from surgery.inspect.scan import scan
    from surgery.inspect.tensor_diff import is_comparable, pair_job
    from surgery.threads import computing_workers

    sides = [resolve(source, variant=variant, token=token) for source in (a, b)]
    with ExitStack() as stack:
        places = [Side(side, stack.enter_context(open_all(side))) for side in sides]
        found = list(_match(*places))
        jobs: dict[int, Job[Any, Pair]] = {}
        for i, (_, one, other) in enumerate(found):
            if one and other and is_comparable(one[1], other[1]):
                jobs[i] = pair_job(one, other)
        nbytes = sum(tensor.nbytes for job in jobs.values() for _, tensor in job.readers)
        with bar(nbytes, "comparing") as on_bytes:
            scan(jobs.values(), workers=workers or computing_workers(), on_bytes=on_bytes)
    tensors = [
        Difference(component, one and one[1], other and other[1], jobs[i].result if i in jobs else None)
        for i, (component, one, other) in enumerate(found)
    ]
    tensors.sort(key=lambda tensor: tensor.name)  # for those that are equally bad
    tensors.sort(key=_badness, reverse=True)
    return Comparison(sides[0], sides[1], tuple(tensors), agree(sides[0], sides[1], tensors))


_Place = tuple["Source", Tensor]
_Key = tuple[str, str]  # component and name


class Side:
    """The tensors of one checkpoint, by component and by each name they go by there."""

    def __init__(self, checkpoint: Checkpoint, sources: "dict[str, Source]") -> None:
        self.kept: dict[_Key, _Place] = {}
        self.places: dict[_Key, _Place] = {}
        component_of = components(checkpoint)
        for file, source in sources.items():
            component = component_of[file]
            for tensor in source.header.tensors:
                if (component, tensor.name) in self.kept:
                    raise SourceError(
                        f"{checkpoint.path(file)}: expected each tensor in one shard, got {tensor.name!r} also in "
                        "another. Remove the stale one."
                    )
                self.kept[component, tensor.name] = source, tensor
            self.places |= {(component, name): self.kept[component, kept] for name, kept in source.tied.items()}
        self.places |= self.kept


def _match(a: Side, b: Side) -> Iterator[tuple[str, _Place | None, _Place | None]]:
    """Pair the tensors of two sides: by name, and where one keeps a tied tensor under another name, by that."""
    matched: set[tuple[int, int]] = set()
    used: set[int] = set()
    for key in dict.fromkeys([*a.places, *b.places]):
        one, other = a.places.get(key), b.places.get(key)
        if one and other and (id(one), id(other)) not in matched:
            matched.add((id(one), id(other)))
            used |= {id(one), id(other)}
            yield key[0], one, other
    for (component, _), one in a.kept.items():
        if id(one) not in used:
            yield component, one, None
    for (component, _), other in b.kept.items():
        if id(other) not in used:
            yield component, None, other


def _badness(tensor: Difference) -> tuple[int, float, float]:
    """Rank by what matters most: NaN and Inf, tensors without a match, then how far the elements moved."""
    pair = tensor.pair
    if tensor.kind == EQUAL or not pair:
        return (0 if tensor.kind == EQUAL else 2), 0.0, 0.0
    far = pair.rms_over_std
    return (3 if pair.broken else 1), math.inf if math.isnan(far) else far, pair.max_d
