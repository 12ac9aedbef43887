"""Tensors in boxes: which boxes cover a tensor, and the bytes of any run of it."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery.checkpoint.boxes import Box, copy_bytes, cover_fault


@st.composite
def _grids(draw: st.DrawFn) -> tuple[np.ndarray, list[Box]]:
    """Cut a small tensor along lines in each dimension."""
    shape = draw(st.lists(st.integers(1, 5), max_size=3))
    whole = np.arange(np.prod(shape, dtype=int), dtype=draw(st.sampled_from(["<u2", "<u8"]))).reshape(shape)
    boxes: list[Box] = [((0,) * len(shape), whole)]
    for dim, size in enumerate(shape):
        lines = [0, *sorted(draw(st.sets(st.integers(1, 4)))), size]
        spans = [(a, b) for a, b in pairwise(lines) if a < b <= size]
        spans = spans if spans and spans[-1][1] == size else [(0, size)]
        boxes = [
            ((*offset[:dim], a, *offset[dim + 1 :]), data[(slice(None),) * dim + (slice(a, b),)])
            for offset, data in boxes
            for a, b in spans
        ]
    return whole, draw(st.permutations(boxes))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(grid=_grids(), data=st.data())
def test_any_run_of_bytes_is_the_whole_ones(grid: tuple[np.ndarray, list[Box]], data: st.DataObject) -> None:
    whole, boxes = grid
    assert cover_fault(whole.shape, [(offset, part.shape) for offset, part in boxes]) is None
    start = data.draw(st.integers(0, whole.nbytes))
    buffer = bytearray(data.draw(st.integers(0, whole.nbytes - start)))
    copy_bytes(boxes, whole.shape, start, memoryview(buffer))
    assert buffer == whole.tobytes()[start : start + len(buffer)]


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        ([((0, 0), (4, 2)), ((0, 2), (4, 1))], None),
        ([((0, 0), (2, 3)), ((2, 0), (2, 1)), ((2, 1), (2, 2))], None),
        ([((0, 0), (4, 2))], "none of element [0, 2]"),
        ([((0, 0), (2, 3)), ((3, 0), (1, 3))], "none of element [2, 0]"),
        ([((0, 0), (3, 3)), ((2, 0), (2, 3))], "two that hold element [2, 0]"),
        ([((0, 0), (4, 3)), ((0, 0), (4, 3))], "two that hold element [0, 0]"),
        ([((0, 0), (4, 4))], "one from [0, 0] to [4, 4]"),
        ([((-1, 0), (5, 3))], "one from [-1, 0] to [4, 3]"),
        ([((0,), (4,))], "one from [0] to [4]"),
        ([], "none of element [0, 0]"),
    ],
    ids=[
        "columns",
        "uneven",
        "columns missing",
        "rows missing",
        "overlap",
        "twice",
        "too large",
        "negative",
        "flat",
        "none",
    ],
)
def test_boxes_must_cover_a_tensor_once(
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], fault: str | None
) -> None:
    assert cover_fault((4, 3), boxes) == fault


def test_boxes_of_no_grid_are_refused_before_they_take_memory() -> None:
    boxes = [((i, i), (1, 1)) for i in range(6000)]
    assert cover_fault((6000, 6000), boxes) == "6000 that are no grid"


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_scalars_and_empty_tensors_are_covered(shape: tuple[int, ...]) -> None:
    assert cover_fault(shape, [((0,) * len(shape), shape)]) is None
