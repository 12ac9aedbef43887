"""What the CPU can tell of w_pre in the CPU's memory: the order it is fetched in, and the values that come."""

import copy
import pickle

import pytest
import torch

from surgery.hooks.weights.offload import Offload, Order
from surgery.hooks.weights.pretrained import Pretrained


def weights(count: int) -> list[Pretrained]:
    return [Pretrained(str(i), torch.full((2,), float(i)), None) for i in range(count)]


def walk(order: Order, turns: list[Pretrained], *, is_backward: bool = False) -> list[str | None]:
    guesses = [order.follow(turn, is_backward=is_backward) for turn in turns]
    return [guess.name if guess else None for guess in guesses]


def test_order_of_the_first_pass_is_unknown() -> None:
    assert walk(Order(), weights(3)) == [None, None, None]


def test_order_is_known_from_the_second_pass_on() -> None:
    order, turns = Order(), weights(3)
    walk(order, turns)
    assert walk(order, turns) == ["1", "2", "0"]
    assert walk(order, turns) == ["1", "2", "0"]


def test_order_of_backward_is_its_own() -> None:
    order, turns = Order(), weights(3)
    for _ in range(2):
        walk(order, turns)
        walk(order, turns[::-1], is_backward=True)
    assert walk(order, turns) == ["1", "2", "0"]
    assert walk(order, turns[::-1], is_backward=True) == ["1", "0", "2"]


def test_order_that_changes_is_learned_anew() -> None:
    order, (a, b, c) = Order(), weights(3)
    walk(order, [a, b, c])
    walk(order, [a, c, b])
    assert walk(order, [a, c, b]) == ["2", "1", "0"]


def test_weight_after_itself_is_not_fetched_again() -> None:
    order, (a, _) = Order(), weights(2)
    assert walk(order, [a, a, a]) == [None, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fetched_on_the_cpu_has_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    (pretrained,) = weights(1)
    fetched = Offload().fetch(pretrained, torch.ones(2, dtype=dtype))
    assert fetched.dtype == dtype
    assert torch.equal(fetched.float(), pretrained.values)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_copy_starts_with_nothing_on_its_way(clone: object) -> None:
    offload = Offload()
    offload._order.follow(weights(1)[0], is_backward=False)
    assert clone(offload)._order._last == {}
