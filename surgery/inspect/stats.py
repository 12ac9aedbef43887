"""Mean, std, min, max, NaN and Inf of one tensor: sums of its pieces, merged to the std that perturb uses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile
from surgery.dtypes import BITS, storage, to_numbers
from surgery.inspect.scan import Measurement, Run
from surgery.kernels.sums import Sums, summarize, summarize_file
from surgery.noisytune import FLOATS, Moments, merge_blocks, pool


@dataclass(frozen=True)
class Stats:
    """What is known of a tensor's elements, or of several tensors' together.

    Args:
        moments: count, mean and spread of the finite elements; std is the contract's, to the bit. Not finite where they
            overflow float64.
        min, max: of the finite elements; inf and -inf if there are none.
        nan, inf: how many elements are NaN, and how many are Inf or -Inf.
    """

    moments: Moments
    min: float
    max: float
    nan: int
    inf: int


def stats_measurement(source: WeightFile, tensor: Tensor) -> Measurement[Sums, Stats]:
    """Return the work that measures a tensor of a dtype that holds numbers."""
    shift = first_number(source, tensor)
    return Measurement(
        [(source, tensor)],
        measure=lambda runs: sums_of(runs[0], shift),
        merge=lambda parts: merge_sums(parts, tensor.size, shift),
    )


def first_number(source: WeightFile, tensor: Tensor) -> float:
    """Return a tensor's first element, from which the contract counts; 0 if it is not finite or there is none."""
    data = bytearray(BITS[tensor.dtype] // 8 if tensor.size else 0)
    source.read_into(tensor, 0, memoryview(data))
    values, _ = to_numbers(storage(memoryview(data), tensor.dtype), tensor.dtype)
    return next((value for value in values.tolist() if math.isfinite(value)), 0.0)


def sums_of(run: Run, shift: float) -> Sums:
    """Sum up a run of a tensor's elements that starts on a block boundary."""
    dtype = run.tensor.dtype
    if dtype not in FLOATS:
        return summarize(*to_numbers(storage(run.read(), dtype), dtype), shift)
    with run.place() as place:
        found = summarize_file(place, run.elements, dtype, shift) if place else None
    return found or summarize(storage(run.read(), dtype), dtype, shift)


def merge_sums(parts: Sequence[Sums], size: int, shift: float) -> Stats:
    """Merge the sums of a tensor's runs, in their order.

    Args:
        size: number of elements in the tensor.
        shift: that the sums were taken with.
    """
    nan, inf = sum(part.nan for part in parts), sum(part.inf for part in parts)
    blocks = np.concatenate([np.empty((0, 2)), *(part.blocks for part in parts)])
    n = size - nan - inf
    if not np.isfinite(blocks).all():
        moments = Moments(n, math.nan, math.nan)
    else:
        moments = merge_blocks(blocks, n, shift, what="") if n else Moments(0, 0.0, 0.0)
    low = min((part.low for part in parts), default=math.inf)
    return Stats(moments, low, max((part.high for part in parts), default=-math.inf), nan, inf)


def pool_stats(parts: Sequence[Stats]) -> Stats:
    """Merge what is known of several tensors into what is known of all their elements together."""
    return Stats(
        pool([part.moments for part in parts if part.moments.n]),
        min((part.min for part in parts), default=math.inf),
        max((part.max for part in parts), default=-math.inf),
        sum(part.nan for part in parts),
        sum(part.inf for part in parts),
    )
