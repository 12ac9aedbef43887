"""d = b - a of two tensors of one shape and any two dtypes: count, rms, max, cosine, merged from pieces."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile
from surgery.dtypes import is_measurable, storage, to_numbers
from surgery.inspect.scan import Measurement, Run
from surgery.inspect.stats import Stats, first_number, merge_sums, sums_of
from surgery.kernels.sums import PairSums, Sums, compare, compare_files
from surgery.noisytune import FLOATS


@dataclass(frozen=True)
class TensorDiff:
    """How tensor b differs from tensor a; d = b - a, over the pairs of elements of which both are finite.

    Args:
        changed: how many elements differ; compared bit for bit, after widening if the dtypes differ. Of elements that
            are not read as numbers (4 and 6 bits, complex), how many bytes.
        broken: how many of those are NaN or Inf on either side.
        measured: how many pairs the sums below are over; 0 for elements that are not read as numbers.
        sum_d2, sum_a2, sum_b2: sums of squares.
        max_d: the largest |d|.
        stats: of a; None for elements that are not read as numbers.
    """

    changed: int
    broken: int = 0
    measured: int = 0
    sum_d2: float = 0.0
    sum_a2: float = 0.0
    sum_b2: float = 0.0
    max_d: float = 0.0
    stats: Stats | None = None

    @property
    def rms(self) -> float:
        """Root of the mean of d^2."""
        return math.sqrt(self.sum_d2 / self.measured) if self.measured else 0.0

    @property
    def rms_over_std(self) -> float:
        """rms, over the standard deviation of a; Inf where that is 0 and rms is not."""
        std = self.stats.moments.std if self.stats else 0.0
        if std:
            return self.rms / std
        return math.inf if self.rms else 0.0

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between a and b, or None if one of them is 0."""
        if not self.measured:
            return None
        if not self.sum_d2:
            return 1.0
        lengths = math.sqrt(self.sum_a2) * math.sqrt(self.sum_b2)
        # a * b = (a^2 + b^2 - d^2) / 2
        return max(-1.0, min(1.0, (self.sum_a2 + self.sum_b2 - self.sum_d2) / 2 / lengths)) if lengths else None


def diff_measurement(
    a: "tuple[WeightFile, Tensor]", b: "tuple[WeightFile, Tensor]"
) -> Measurement[tuple[Sums | None, PairSums], TensorDiff]:
    """Return the work that compares two tensors of one shape: of dtypes that hold numbers, or else of one dtype."""
    if not is_measurable(a[1].dtype):
        return Measurement([a, b], measure=_compare_bytes, merge=_merge_bytes)
    shift = first_number(*a)
    return Measurement(
        [a, b],
        measure=lambda runs: _measure(*runs, shift=shift),
        merge=lambda parts: _merge(parts, a[1].size, shift),
    )


def is_comparable(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors' elements can be compared one by one."""
    is_same = a.dtype == b.dtype or (is_measurable(a.dtype) and is_measurable(b.dtype))
    return a.shape == b.shape and is_same


def _measure(a: Run, b: Run, *, shift: float) -> tuple[Sums, PairSums]:
    dtype, other = a.tensor.dtype, b.tensor.dtype
    if dtype == other and dtype in FLOATS:
        with a.place() as here, b.place() as there:
            found = compare_files(here, there, a.elements, dtype, shift) if here and there else None
        if found:
            return found
    return sums_of(a, shift), _compare(storage(a.read(), dtype), dtype, storage(b.read(), other), other)


def _compare(a: np.ndarray, dtype: str, b: np.ndarray, other: str) -> PairSums:
    if dtype == other and dtype in FLOATS:
        return compare(a, b, dtype)
    (x, wide), (y, wide_too) = to_numbers(a, dtype), to_numbers(b, other)
    if wide != wide_too:
        x, y, wide = x.astype(np.float64), y.astype(np.float64), "F64"
    found = compare(x, y, wide)
    if dtype != other:
        return found
    changed = int(np.count_nonzero(a != b))  # integers beyond 2^53 may differ where their floats do not
    return PairSums(found.blocks, changed, found.broken, found.skipped)


def _merge(parts: Sequence[tuple[Sums | None, PairSums]], size: int, shift: float) -> TensorDiff:
    found = [part for _, part in parts]
    blocks = np.concatenate([np.empty((0, 4)), *(part.blocks for part in found)])
    d2, a2, b2 = (math.fsum(column.tolist()) if np.isfinite(column).all() else math.inf for column in blocks[:, :3].T)
    return TensorDiff(
        changed=sum(part.changed for part in found),
        broken=sum(part.broken for part in found),
        measured=size - sum(part.skipped for part in found),
        sum_d2=d2,
        sum_a2=a2,
        sum_b2=b2,
        max_d=float(blocks[:, 3].max(initial=0.0)),
        stats=merge_sums([part for part, _ in parts if part], size, shift),
    )


def _compare_bytes(runs: Sequence[Run]) -> tuple[None, PairSums]:
    a, b = (np.frombuffer(run.read(), np.uint8) for run in runs)
    return None, PairSums(np.empty((0, 4)), int(np.count_nonzero(a != b)), 0, 0)


def _merge_bytes(parts: Sequence[tuple[Sums | None, PairSums]]) -> TensorDiff:
    return TensorDiff(sum(part.changed for _, part in parts))
