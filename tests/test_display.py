"""What a result shows of itself in Python: a repr of one bounded line, and HTML for notebooks that no name breaks."""

import importlib
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Any

import pytest

from surgery.display import Brief, as_html, as_shape, number
from surgery.noisytune import Effect, NoisyTune
from surgery.recipe import FileRecord, Recipe, TensorRecord

HOSTILE = "<script>alert(1)</script>\x1b[31m$x$\u202e\ud800"
RESULTS = {
    "surgery.checkpoint.layout": ("WeightSet", "Layout"),
    "surgery.checkpoint.resolve": ("Checkpoint",),
    "surgery.checkpoint.tensorfile": ("Tensor", "Header"),
    "surgery.hooks.description": ("Acted", "Description"),
    "surgery.inspect.comparison": ("TensorComparison", "Agreement", "Comparison"),
    "surgery.inspect.inspection": ("TensorInfo", "Inspection"),
    "surgery.noisytune": ("NoisyTune",),
    "surgery.perturb.compare_file": ("TensorMismatch",),
    "surgery.perturb.verify": ("Verification",),
    "surgery.push.contents": ("LocalFile", "Contents"),
    "surgery.push.push": ("Pushed",),
    "surgery.push.remote": ("RemoteRevision", "PushPlan"),
    "surgery.recipe": ("TensorRecord", "FileRecord", "Recipe"),
}


@dataclass(frozen=True, repr=False)
class Shown(Brief):
    value: Any
    hidden: str = field(default="a token", repr=False)


def record(name: str = "a.weight") -> TensorRecord:
    return TensorRecord(name, "F32", (2, 3), 0.5, None, Effect(0.25, 1.0), "class")


def recipe(*tensors: TensorRecord) -> Recipe:
    file = FileRecord("model.safetensors", "blake3:1", "model.safetensors", "blake3:2", tensors)
    return Recipe("org/name", "c0ffee", NoisyTune(seed=3), (file,))


@pytest.mark.parametrize("name", [f"{module}.{name}" for module, names in RESULTS.items() for name in names])
def test_results_have_a_bounded_repr(name):
    module, _, kind = name.rpartition(".")
    assert getattr(importlib.import_module(module), kind).__repr__ is Brief.__repr__


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.5, "1.5"),
        ("it's", '"it\'s"'),
        (HOSTILE, "'<script>alert(1)</script>\\x1b[31m$x$\\u202e\\ud800'"),
        ("a" * 120, f"'{'a' * 120}'"),
        ("a" * 121, f"'{'a' * 120}'..."),
        (b"a" * 32, f"b'{'a' * 32}'"),
        (b"a" * 1033, "<1,033 bytes>"),
        ((1,), "(1,)"),
        ((1, 2, 3, 4), "(1, 2, 3, 4)"),
        ((1, 2, 3, 4, 5), "<5 int>"),
        ([1, "a", 3, 4, 5], "<5 items>"),
        ([1], "[1]"),
        ({1}, "{1}"),
        ({"a": (1, 2)}, "{'a': (1, 2)}"),
        (dict.fromkeys("abcde"), "<5 str>"),
        ((record(),) * 1204, "<1,204 TensorRecord>"),
        (Effect(0.25, 1.0), "Effect(noise_over_std=0.25, survived=1.0)"),
        (Shown(Shown(1)), "Shown(value=Shown(...))"),
        (range(10**130, 10**130 + 1), f"range(1{'0' * 110}..."),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_repr_of_a_field(value, shown):
    assert repr(Shown(value)) == f"Shown(value={shown})"


def test_repr_is_one_bounded_line():
    assert repr(record()) == (
        "TensorRecord(name='a.weight', dtype='F32', shape=(2, 3), std=0.5, copied=None, "
        "effect=Effect(noise_over_std=0.25, survived=1.0), known='class')"
    )
    line = repr(Shown(["\ud800" * 120] * 4))
    assert len(line) == 1000
    assert line.endswith("...")


def test_repr_of_a_large_recipe():
    large = recipe(*(record(f"layers.{i}.weight") for i in range(20_000)))
    assert "tensors=<20,000 TensorRecord>" in repr(large)
    assert "settings=NoisyTune(lam=0.15, seed=3, " in repr(large)
    assert len(repr(large)) < 1000
    assert str(large) == repr(large)


def test_a_result_is_what_it_was():
    first = recipe(record())
    assert first == recipe(record())
    assert first != recipe(record("b.weight"))
    assert hash(record()) == hash(record())
    assert pickle.loads(pickle.dumps(first)) == first
    assert replace(first, commit=None).source == "org/name"
    with pytest.raises(FrozenInstanceError):
        first.source = ""
    with pytest.raises(TypeError, match="unhashable"):  # by its dict of companions
        hash(first)


def test_html_of_a_recipe():
    copied = TensorRecord("ids", "I64", (), None, "I64, not floating point")
    assert replace(recipe(record(), copied), notes=("a note",))._repr_html_() == as_html(
        [
            "NoisyTune of org/name@c0ffee",
            "lam 0.15, seed 3, noise uniform, scale matrix, rounding nearest",
            "1 of 2 tensors perturbed",
            "copied: 1 (ids): I64, not floating point",
            "a note",
        ],
        ["tensor", "dtype", "shape", "std", "noise / std", "survived", ""],
        [
            ["a.weight", "f32", "2 x 3", "0.5", "0.25", "100.00%", "perturbed"],
            ["ids", "i64", "scalar", "-", "", "", "copied: I64, not floating point"],
        ],
        list,
    )


def test_html_of_a_large_hostile_recipe_is_short():
    large = recipe(*(record(f"{HOSTILE}.{i}") for i in range(20_000)))
    shown = large._repr_html_()
    assert len(shown) < 8_000
    assert "<p>and 19,980 more</p>" in shown
    assert "<script" not in shown
    assert shown.isprintable()


def test_html_of_a_table():
    shown = as_html(["one", "a & b"], ["name", "n", ""], [1, 2], lambda i: [f"<{i}>", str(i), "$"])
    left = ' style="text-align:left"'
    assert shown == (
        '<div class="tex2jax_ignore mathjax_ignore"><p>one<br>a &amp; b</p>'
        f"<table><tr><th{left}>name</th><th>n</th><th{left}></th></tr>"
        f"<tr><td{left}>&lt;1&gt;</td><td>1</td><td{left}>$</td></tr>"
        f"<tr><td{left}>&lt;2&gt;</td><td>2</td><td{left}>$</td></tr></table></div>"
    )


def test_html_of_nothing_has_no_table():
    assert as_html(["one"], ["name"], [], str) == '<div class="tex2jax_ignore mathjax_ignore"><p>one</p></div>'


@pytest.mark.parametrize(("n", "more"), [(20, ""), (21, "<p>and 1 more</p>"), (1525, "<p>and 1,505 more</p>")])
def test_html_of_many_rows_is_short(n, more):
    shown = as_html([], ["name"], range(n), lambda i: [str(i)])
    assert shown.count("<td") == 20
    assert shown.endswith(f"</table>{more}</div>")


def test_html_of_a_hostile_name():
    shown = as_html([HOSTILE], [HOSTILE], [HOSTILE], lambda name: [name])
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m$x$\\u202e\\ud800") == 3
    assert shown.isprintable()
    assert "<script" not in shown


def test_html_of_a_long_name_loses_its_middle():
    name = "a" * 100_000 + "b" * 100_000
    assert as_html([name], ["name"], [name], lambda name: [name]).count(f">{'a' * 99}…{'b' * 100}<") == 2


def test_html_of_many_lines_is_short():
    shown = as_html([*"abcdefghijklmnopqrstuvw", "z"], [], [], str)
    assert "<p>a<br>b<br>" in shown
    assert "<br>t<br>and 4 more</p>" in shown
    assert "<p>" not in as_html([], [], [], str)


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (float("nan"), "-"), (0.043301, "0.0433"), (float("inf"), "inf")]
)
def test_number(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(("shape", "shown"), [((), "scalar"), ((3,), "3"), ((5632, 2048), "5632 x 2048")])
def test_shape(shape, shown):
    assert as_shape(shape) == shown
