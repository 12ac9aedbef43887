"""diff_checkpoints: match tensors by name and tie, whatever files they are in, then compare them element by element."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.resolve import Checkpoint, resolve
from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile, reading_workers
from surgery.errors import SourceError
from surgery.inspect.comparison import EQUAL, Comparison, TensorComparison
from surgery.inspect.inspection import components, open_all, read_recipe
from surgery.progress import bar

if TYPE_CHECKING:
    from surgery.inspect.scan import Measurement
    from surgery.inspect.tensor_diff import TensorDiff


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
        a, b: Hub ids, perhaps with `@revision`, folders, URLs, or .safetensors or PyTorch files.
        variant: as in from_pretrained, such as "fp16"; of both.
        token: Hub token; default: the one stored on this machine.
        workers: threads; default: one per core, at most 16.
    Raises:
        SettingError, SourceError: one of them is missing, malformed or unsafe.
    """
    return compare(*(resolve(source, variant=variant, token=token) for source in (a, b)), workers=workers)


def compare(a: Checkpoint, b: Checkpoint, *, workers: int | None = None) -> Comparison:
    """Compare two checkpoints that are here, as diff_checkpoints does.

    Raises:
        SourceError: one of them is malformed, unsafe, or changed meanwhile.
    """
    from surgery.inspect.agreement import check_agreement
    from surgery.threads import computing_workers

    sides = [_as_source_of(a, b), _as_source_of(b, a)]
    with ExitStack() as stack:
        indexes = [TensorIndex(side, stack.enter_context(open_all(side))) for side in sides]
        tensors = _compare(list(_match(*indexes)), workers or reading_workers(computing_workers(), *sides))
    tensors.sort(key=lambda tensor: tensor.name)  # for those that are equally bad
    tensors.sort(key=_badness, reverse=True)
    return Comparison(sides[0], sides[1], tuple(tensors), check_agreement(sides[0], sides[1], tensors))


def _as_source_of(source: Checkpoint, made: Checkpoint) -> Checkpoint:
    """Read a checkpoint as the other one's recipe says that it was read: of several state_dicts one, or dequantized."""
    from surgery.inspect.agreement import is_source

    recipe = read_recipe(made)
    if recipe is None or (recipe.key, recipe.dequantize) == (None, None) or not is_source(source, recipe):
        return source
    return replace(source, key=recipe.key, dequantize=recipe.dequantize)


_Located = tuple[WeightFile, Tensor]
_Key = tuple[str, str]  # component and name
_Matched = tuple[str, _Located | None, _Located | None]  # component, and the tensor on either side


class TensorIndex:
    """The tensors of one checkpoint, and the open file that each is in, by component and name.

    Args:
        stored: under the names that the files store.
        by_name: under those, and under the names that are tied to them.
    """

    def __init__(self, checkpoint: Checkpoint, sources: "dict[str, WeightFile]") -> None:
        self.stored: dict[_Key, _Located] = {}
        self.by_name: dict[_Key, _Located] = {}
        component_of = components(checkpoint)
        for file, source in sources.items():
            component = component_of[file]
            for tensor in source.header.tensors:
                if (component, tensor.name) in self.stored:
                    raise SourceError(
                        f"{checkpoint.label(file)}: expected each tensor in one shard, got {tensor.name!r} also in "
                        "another. Remove the stale one."
                    )
                self.stored[component, tensor.name] = source, tensor
            self.by_name |= {(component, name): self.stored[component, kept] for name, kept in source.tied.items()}
        self.by_name |= self.stored


def _match(a: TensorIndex, b: TensorIndex) -> Iterator[_Matched]:
    """Pair the tensors of two checkpoints: by name, and where one keeps a tied tensor under another name, by that."""
    matched: set[tuple[int, int]] = set()
    used: set[int] = set()
    for key in dict.fromkeys([*a.by_name, *b.by_name]):
        one, other = a.by_name.get(key), b.by_name.get(key)
        if one and other and (id(one), id(other)) not in matched:
            matched.add((id(one), id(other)))
            used |= {id(one), id(other)}
            yield key[0], one, other
    for (component, _), one in a.stored.items():
        if id(one) not in used:
            yield component, one, None
    for (component, _), other in b.stored.items():
        if id(other) not in used:
            yield component, None, other


def _compare(found: Sequence[_Matched], workers: int) -> list[TensorComparison]:
    """Read the tensors that can be compared element by element, and return a comparison of all."""
    from surgery.inspect.scan import scan
    from surgery.inspect.tensor_diff import diff_measurement, is_comparable

    measurements: dict[int, Measurement[Any, TensorDiff]] = {}
    for i, (_, one, other) in enumerate(found):
        if one and other and is_comparable(one[1], other[1]):
            measurements[i] = diff_measurement(one, other)
    nbytes = sum(tensor.nbytes for measurement in measurements.values() for _, tensor in measurement.readers)
    with bar(nbytes, "comparing") as on_bytes:
        scan(measurements.values(), workers=workers, on_bytes=on_bytes)
    return [
        TensorComparison(component, a and a[1], b and b[1], measurements[i].result if i in measurements else None)
        for i, (component, a, b) in enumerate(found)
    ]


def _badness(tensor: TensorComparison) -> tuple[int, float, float]:
    """Rank by what matters most: NaN and Inf, tensors without a match, then how far the elements moved."""
    pair = tensor.pair
    if tensor.kind == EQUAL or not pair:
        return (0 if tensor.kind == EQUAL else 2), 0.0, 0.0
    far = pair.rms_over_std
    return (3 if pair.broken else 1), math.inf if math.isnan(far) else far, pair.max_d
