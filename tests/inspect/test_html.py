"""What a notebook shows of a comparison and of an inspection: totals, and one short table, the worst first."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery import diff_checkpoints, inspect_checkpoint, perturb_checkpoint
from surgery.display import as_html
from surgery.inspect.comparison import Comparison, TensorComparison

HOSTILE = "<script>alert(1)</script>\x1b[31m$x$"
DIFF = ["tensor", "max |d|", "rms d", "rms d / std", "cosine", "differ", ""]


def write(path: Path, **tensors: np.ndarray) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def test_html_of_a_comparison_has_the_worst_first(tmp_path):
    one, other = np.array([1, 2, 3], np.float32), np.array([1, 2, 4], np.float32)
    nan = np.array([1, 2, np.nan], np.float32)
    a = write(tmp_path / "a", same=one, broken=one, moved=one, gone=one, cast=one, turned=one)
    b = write(tmp_path / "b", same=one, broken=nan, moved=other, cast=one.astype(np.float16), turned=one[:2])
    assert diff_checkpoints(a, b)._repr_html_() == as_html(
        [f"A: {a}", f"B: {b}", "3 changed, 1 equal, 1 shape, 1 only in A"],
        DIFF,
        [
            ["broken", "0", "0", "0", "1.000000", "1", "1 NaN or Inf"],
            ["gone", *[""] * 5, "only in A"],
            ["turned", *[""] * 5, "3 -> 2"],
            ["moved", "1", "0.5774", "0.5774", "0.991460", "1", ""],
            ["cast", "0", "0", "0", "1.000000", "0", "f32 -> f16"],
        ],
        list,
    )


def test_html_of_a_comparison_says_whether_the_recipe_agrees(tmp_path):
    rng = np.random.default_rng(0)
    a = write(tmp_path / "a", **{name: rng.standard_normal((64, 64)).astype(np.float32) for name in "vw"})
    perturb_checkpoint(a, tmp_path / "b")
    comparison = diff_checkpoints(a, tmp_path / "b")
    assert "<br>B is perturb(A), says its surgery.json; the figures agree</p>" in comparison._repr_html_()
    assert comparison.agreement
    wrong = replace(comparison, agreement=replace(comparison.agreement, disagreeing={"v": "std"}))
    assert "; the figures do not agree in 1 tensors (v)</p>" in wrong._repr_html_()


def test_html_of_a_large_hostile_comparison_is_short(tmp_path):
    a = write(tmp_path / "a", w=np.ones(3, np.float32))
    found = diff_checkpoints(a, a)
    (tensor,) = found.tensors
    assert tensor.a
    lone = replace(tensor.a, name=HOSTILE)
    large = Comparison(found.a, found.b, (TensorComparison("", lone, None),) * 20_000, None)
    shown = large._repr_html_()
    assert len(shown) < 8_000
    assert "20,000 only in A" in shown
    assert "<p>and 19,980 more</p>" in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m$x$" in shown
    assert "<script" not in shown
    assert "tensors=<20,000 TensorComparison>" in repr(large)
    assert len(repr(large)) <= 1000


@pytest.mark.parametrize("stats", [False, True], ids=["headers", "stats"])
def test_html_of_an_inspection_has_groups_and_what_is_refused_first(stats, tmp_path):
    one = np.array([[1, 2], [3, 4]], np.float32)
    ids, nan = np.arange(3), np.array([np.nan, np.inf, 1, 2], np.float32)
    a = write(tmp_path / "a", **{"h.0.w": one, "h.1.w": one + 4, "ids": ids, "late.w": nan})
    figures = [
        ["4.5", "2.449", "1", "8", "0", "0"],
        ["1", "1", "0", "2", "0", "0"],
        ["1.5", "0.7071", "1", "2", "1", "1"],
    ]
    pair, integers, broken = figures if stats else ([], [], [])
    rows = [
        ["ids", "", "i64", "3", *integers, "copied: I64, not floating point"],
        ["h.{0..1}.w", "x2", "f32", "2 x 2", *pair, "perturbed"],
        ["late.w", "", "f32", "4", *broken, "NaN or Inf: perturb refuses it" if stats else "perturbed"],
    ]
    titles = ["mean", "std", "min", "max", "NaN", "Inf"] if stats else []
    assert inspect_checkpoint(a, stats=stats)._repr_html_() == as_html(
        [str(a), f"15 parameters in 4 tensors; perturb changes {2 if stats else 3} of them"],
        ["tensor", "", "dtype", "shape", *titles, "perturb"],
        [rows[2], rows[0], rows[1]] if stats else rows,
        list,
    )


def test_html_of_an_inspection_names_quantization_and_recipe(tmp_path):
    a = write(tmp_path / "a", w=np.array([1, 2, 3], np.float32))
    perturb_checkpoint(a, tmp_path / "b")
    found = replace(inspect_checkpoint(tmp_path / "b"), quantized="W8A8")
    assert f"<br>W8A8: perturb refuses it<br>its surgery.json says: NoisyTune of {a}</p>" in found._repr_html_()
