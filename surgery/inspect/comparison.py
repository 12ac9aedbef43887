"""The result of diff as frozen dataclasses: one TensorComparison for each tensor of A, of B, or of both."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.checkpoint.resolve import Checkpoint
from surgery.checkpoint.tensorfile import Tensor
from surgery.display import Brief, as_html, as_shape, at_commit, number
from surgery.errors import some
from surgery.recipe import Recipe

if TYPE_CHECKING:
    from surgery.inspect.tensor_diff import TensorDiff

EQUAL, CHANGED, RESHAPED, ONLY_IN_A, ONLY_IN_B = "equal", "changed", "shape", "only in A", "only in B"


@dataclass(frozen=True, repr=False)
class TensorComparison(Brief):
    """One tensor of A, of B, or of both, perhaps under names that are tied.

    Args:
        component: folder within the checkpoint, and file where a folder holds several models.
        a, b: the tensor on either side, or None.
        pair: how they differ; None where they cannot be compared element by element.
    """

    component: str
    a: Tensor | None
    b: Tensor | None
    pair: "TensorDiff | None" = None

    @property
    def name(self) -> str:
        """A's name for it, or else B's."""
        name = (self.a or self.b or _NOTHING).name
        return f"{self.component}/{name}" if self.component else name

    @property
    def kind(self) -> str:
        """Which of EQUAL, CHANGED, RESHAPED, ONLY_IN_A and ONLY_IN_B it is. Another dtype is a change."""
        if self.a is None or self.b is None:
            return ONLY_IN_B if self.a is None else ONLY_IN_A
        if self.a.shape != self.b.shape:
            return RESHAPED
        is_same = self.a.dtype == self.b.dtype and self.pair is not None and not self.pair.changed
        return EQUAL if is_same else CHANGED


_NOTHING = Tensor("", "", (), 0, 0)


@dataclass(frozen=True, repr=False)
class Agreement(Brief):
    """Whether B is perturb(A), as far as the figures tell; `surgery verify` tells it to the bit.

    Args:
        recipe: B's, made from A.
        disagreeing: what is not as it says, by tensor.
    """

    recipe: Recipe
    disagreeing: Mapping[str, str]


@dataclass(frozen=True, repr=False)
class Comparison(Brief):
    """How checkpoint B differs from checkpoint A.

    Args:
        tensors: the worst first: NaN and Inf, then the largest rms d over std(A); equal ones last.
        agreement: of the figures with B's recipe, if that was made from A.
    """

    a: Checkpoint
    b: Checkpoint
    tensors: tuple[TensorComparison, ...]
    agreement: Agreement | None

    def count(self, kind: str) -> int:
        """Return how many tensors are of a kind."""
        return Counter(tensor.kind for tensor in self.tensors)[kind]

    @property
    def pairs(self) -> "list[TensorDiff]":
        return [tensor.pair for tensor in self.tensors if tensor.pair]

    def _repr_html_(self) -> str:
        counts = Counter(tensor.kind for tensor in self.tensors)
        lines = [
            f"A: {at_commit(self.a.id, self.a.commit)}",
            f"B: {at_commit(self.b.id, self.b.commit)}",
            ", ".join(f"{counts[kind]:,} {kind}" for kind in _KINDS if counts[kind]),
        ]
        if self.agreement:
            wrong = list(self.agreement.disagreeing)
            verdict = (
                f"the figures do not agree in {len(wrong):,} tensors ({some(wrong)})" if wrong else "the figures agree"
            )
            lines.append(f"B is perturb(A), says its surgery.json; {verdict}")
        return as_html(lines, _COLUMNS, [tensor for tensor in self.tensors if tensor.kind != EQUAL], _cells)


_KINDS = (CHANGED, EQUAL, RESHAPED, ONLY_IN_A, ONLY_IN_B)
_COLUMNS = ("tensor", "max |d|", "rms d", "rms d / std", "cosine", "differ", "")


def _cells(tensor: TensorComparison) -> list[str]:
    pair, figures = tensor.pair, [""] * 4
    if pair and pair.measured:
        cosine = "-" if pair.cosine is None else f"{pair.cosine:.6f}"
        figures = [number(pair.max_d), number(pair.rms), number(pair.rms_over_std), cosine]
    return [tensor.name, *figures, f"{pair.changed:,}" if pair else "", _note(tensor)]


def _note(tensor: TensorComparison) -> str:
    """Say what the figures do not: what is there on one side only, NaN and Inf, another shape, dtype or name."""
    a, b, pair = tensor.a, tensor.b, tensor.pair
    if a is None or b is None:
        return tensor.kind
    notes = [f"{pair.broken:,} NaN or Inf"] if pair and pair.broken else []
    for one, other in ((as_shape(a.shape), as_shape(b.shape)), (a.dtype.lower(), b.dtype.lower()), (a.name, b.name)):
        notes += [f"{one} -> {other}"] if one != other else []
    return ", ".join(notes)
