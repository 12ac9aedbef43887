"""Patterns of tensor names: which names are one, what the pattern says, how deep each tensor lies."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.inspect.name_patterns import as_braces, depths, group


def patterns(*names: str) -> dict[str, list[str]]:
    return {g.pattern: list(g.members) for g in group(names, name=str, kind=lambda _: None)}


def numbered(template: str, *ranges: range) -> list[str]:
    names = [template]
    for numbers in ranges:
        names = [name.replace("{}", str(n), 1) for name in names for n in numbers]
    return names


def test_layers_are_one_pattern():
    names = numbered("model.layers.{}.mlp.up_proj.weight", range(22))
    assert patterns(*reversed(names)) == {"model.layers.{0..21}.mlp.up_proj.weight": names}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["wte.weight", "ln_f.weight"], ["wte.weight", "ln_f.weight"]),
        (["h.0.w", "h.1.w"], ["h.{0..1}.w"]),
        (["h.0.w", "h.0.b"], ["h.0.w", "h.0.b"]),
        (["1_Dense.linear.w", "2_Dense.linear.w"], ["1_Dense.linear.w", "2_Dense.linear.w"]),
        (["e.0.w1", "e.0.w2", "e.1.w1", "e.1.w2"], ["e.{0..1}.w1", "e.{0..1}.w2"]),
        (["h.00.w", "h.01.w"], ["h.00.w", "h.01.w"]),
        (["0.weight", "2.weight", "2.bias"], ["{0,2}.weight", "2.bias"]),
        (["a.0", "a.1"], ["a.{0..1}"]),
        (["b.0.a.0", "b.0.a.1", "b.1.a.0", "b.1.a.1", "b.1.a.2"], ["b.{0..1}.a.{0..1}", "b.1.a.2"]),
        (["block.0.layer.1.w", "block.1.layer.1.w"], ["block.{0..1}.layer.1.w"]),
        ([], []),
    ],
    ids=["none", "two", "kinds", "prefix", "w1", "zeros", "first", "last", "ragged", "constant", "empty"],
)
def test_patterns_of(names, expected):
    assert list(patterns(*names)) == expected


def test_experts_are_one_pattern():
    names = numbered("model.layers.{}.block_sparse_moe.experts.{}.w1.weight", range(32), range(8))
    assert patterns(*names) == {"model.layers.{0..31}.block_sparse_moe.experts.{0..7}.w1.weight": names}


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([7], "7"), ([0, 1], "{0..1}"), ([0, 1, 2, 3, 5], "{0..3,5}"), ([1, 3, 5, 7], "{1..7..2}"), ([0, 4], "{0,4}")],
    ids=["one", "two", "gap", "every-second", "pair"],
)
def test_braces(numbers, text):
    assert as_braces(numbers) == text


def test_members_of_another_kind_are_a_group_of_their_own():
    items = [("h.0.w", 8), ("h.1.w", 16), ("h.2.w", 8)]
    groups = group(items, name=lambda item: item[0], kind=lambda item: item[1])
    assert [(g.pattern, [size for _, size in g.members]) for g in groups] == [("h.{0,2}.w", [8, 8]), ("h.1.w", [16])]


def test_items_of_one_name_are_all_kept() -> None:
    (found,) = group([("h.0", 1), ("h.1", 2), ("h.0", 3)], name=lambda item: item[0], kind=lambda _: None)
    assert (found.pattern, found.members) == ("h.{0..1}", (("h.0", 1), ("h.0", 3), ("h.1", 2)))


def test_groups_come_in_the_order_of_their_first_members():
    assert list(patterns("z.1.w", "head.w", "z.0.w", "a.b")) == ["z.{0..1}.w", "head.w", "a.b"]


def test_depth_is_the_first_number_that_varies():
    names = numbered("0.encoder.layer.{}.experts.{}.w", range(2), range(2))
    once = "0.encoder.layer.1.attention.bias.0"  # its layer varies in other names
    assert depths([*names, once, "0.pooler.w"]) == {
        "0.encoder.layer.0.experts.0.w": 0,
        "0.encoder.layer.0.experts.1.w": 0,
        "0.encoder.layer.1.experts.0.w": 1,
        "0.encoder.layer.1.experts.1.w": 1,
        once: 1,
        "0.pooler.w": None,
    }


def test_groups_carry_the_depth_of_each_member():
    (found,) = group(["h.2.w", "h.0.w"], name=str, kind=lambda _: None)
    assert found.depths == (0, 2)


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does."""
    match = re.search(r"\{([^}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers: list[int] = []
    for run in match[1].split(","):
        ends = [int(n) for n in run.split("..")]
        numbers += range(ends[0], ends[1] + 1, ends[2] if len(ends) > 2 else 1) if len(ends) > 1 else ends
    return [name for n in numbers for name in expand(pattern.replace(match[0], str(n), 1))]


_parts = st.sampled_from(["h", "w1", "0", "1", "2", "3", "5", "10", "-1", "x"])


@given(st.sets(st.lists(_parts, min_size=1, max_size=4).map(".".join), max_size=40))
def test_patterns_expand_to_exactly_their_members(names):
    found = patterns(*sorted(names))
    for pattern, members in found.items():
        assert expand(pattern) == members
    assert sorted(name for members in found.values() for name in members) == sorted(names)
