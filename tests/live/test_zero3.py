"""The shares of parameters that DeepSpeed's ZeRO-3 has split, of which the last one is padded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flat_zero import split
from torch import nn

from surgery.live.zero3 import shape_of, share_of, size_of, split_like, update_master, write

SHAPES = [(5,), (3, 3), (2, 4), (1,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shares_make_up_the_whole(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values, other = torch.randn(2, *shape)
    found: list[list[torch.Tensor]] = [[], []]
    for rank in range(2):
        w = nn.Parameter(values.clone())
        split(w, rank)
        assert (shape_of(w), size_of(w), w.numel()) == (values.shape, values.numel(), 0)
        found[0].append(share_of(w))
        found[1].append(split_like(w, other))
    assert torch.equal(torch.cat(found[0]), values.reshape(-1))
    assert torch.equal(torch.cat(found[1]), other.reshape(-1))


@pytest.mark.parametrize("rank", [0, 1])
def test_write_takes_whole_values_and_shares(rank: int) -> None:
    w: Any = nn.Parameter(torch.zeros(3, 3))
    split(w, rank)
    told = []
    w._z3_optimizer = SimpleNamespace(set_local_hp_param=lambda values, of: told.append((values.clone(), of)))
    values = torch.arange(9.0).view(3, 3)
    write(w, values)
    assert share_of(w).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8]][rank]
    write(w, -share_of(w))
    assert share_of(w).tolist() == [[0, -1, -2, -3, -4], [-5, -6, -7, -8]][rank]
    assert [of is w for _, of in told] == [True, True]
    assert torch.equal(told[1][0][: share_of(w).numel()], share_of(w))


def test_master_weights_of_zero_1_and_2_are_told() -> None:
    w: Any = nn.Parameter(torch.arange(6.0).view(2, 3))
    fragment = torch.zeros(3)
    place = SimpleNamespace(start=2, numel=3)
    w._hp_mapping = SimpleNamespace(lp_fragment_address=place, hp_fragment=fragment)
    update_master(w)
    assert fragment.tolist() == [2, 3, 4]
