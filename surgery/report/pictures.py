"""Choose what --plot draws of a perturbation, a diff or an inspection: a figure per tensor, and a histogram."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surgery.checkpoint.tensorfile import Tensor, TensorFile
from surgery.checkpoint.weight_file import open_weights
from surgery.errors import SettingError
from surgery.inspect.comparison import EQUAL, Comparison, TensorComparison
from surgery.inspect.diff import TensorIndex
from surgery.inspect.inspection import Inspection, TensorInfo, components, open_all
from surgery.inspect.sample import sample
from surgery.noise import UNIT_STD
from surgery.noisytune import FLOATS, Moments, NoisyTune
from surgery.perturb.plan import Plan
from surgery.recipe import Recipe
from surgery.report.plot import Density, Histogram, Picture, check_plot

_BINS = 30  # of a 16-bit tensor more would show its grid rather than the noise


def check_noise_plot(path: Path, settings: NoisyTune, *, dry_run: bool) -> None:
    """Refuse a picture of noise that could not be drawn or written in the end.

    Raises:
        SettingError: there will be no noise; or as check_plot.
        OutputError: as check_plot.
    """
    if dry_run or settings.lam == 0:
        found = "--dry-run" if dry_run else "lam 0"
        raise SettingError(f"--plot: expected noise to draw, got {found}. Leave one of them out.")
    check_plot(path)


def noise_picture(recipe: Recipe, plan: Plan) -> Picture:
    """Picture what a finished run did: each tensor's noise over its std, and its elements' beside the one asked for."""
    settings = recipe.settings
    values = {tensor.name: tensor.effect.noise_over_std if tensor.effect else None for tensor in recipe.tensors}
    unit = "pooled std" if recipe.pooled_std else "std(w)"
    histogram = _histogram(f"d / {unit}", _changes(recipe, plan), *_expected_noise(settings))
    title = f"{plan.checkpoint.short_name}: NoisyTune, lam {settings.lam:g}, seed {settings.seed}"
    return Picture(title, values, f"rms d / {unit} of a sample", settings.lam * UNIT_STD, histogram)


def diff_picture(comparison: Comparison) -> Picture:
    """Picture how B differs from A: each tensor's rms d over std(A), and its elements' d over std(A).

    Where B's recipe says that it was made from A, both stand beside the noise that the recipe asked for.
    """
    recipe = comparison.agreement.recipe if comparison.agreement else None
    pooled = recipe.pooled_std if recipe else None
    drawn = [found for tensor in comparison.tensors if (found := _drawn(tensor, pooled))]
    values = {tensor.name: None if tensor.kind == EQUAL else math.nan for tensor in comparison.tensors}
    values |= {tensor.name: tensor.value for tensor in drawn}
    values = dict(sorted(values.items()))
    what, samples = f"d / {'pooled std' if pooled else 'std(A)'}", _differences(comparison, drawn)
    title = f"{comparison.b.short_name} against {comparison.a.short_name}"
    if recipe and recipe.settings.lam:
        histogram = _histogram(what, samples, *_expected_noise(recipe.settings))
        return Picture(title, values, f"rms {what}", recipe.settings.lam * UNIT_STD, histogram)
    return Picture(title, values, f"rms {what}", None, _histogram(what, samples, _around(drawn)))


def stats_picture(inspection: Inspection) -> Picture:
    """Picture what a checkpoint holds: each tensor's std, and its elements beside the normal distribution."""
    part = components(inspection.checkpoint)
    names = {info: f"{part[info.file]}/{info.name}".lstrip("/") for info in inspection.tensors}
    drawn = {
        info: info.stats.moments
        for info in inspection.tensors
        if info.stats and info.tensor.dtype in FLOATS and 0 < info.stats.moments.std < math.inf
    }
    values = {names[info]: drawn[info].std if info in drawn else None for info in inspection.tensors}
    edges = np.linspace(-5, 5, _BINS + 1)
    histogram = _histogram("(w - mean) / std", _standardized(inspection, drawn), edges, _normal, "normal")
    title = f"{inspection.checkpoint.short_name}: its weights"
    return Picture(title, values, "std(w)", None, histogram, missing="no spread, or no floats")


@dataclass(frozen=True)
class _Drawn:
    """A tensor that changed, with the std to measure that by, and its rms d over that."""

    name: str
    component: str
    a: Tensor
    b: Tensor
    std: float
    value: float


def _drawn(tensor: TensorComparison, pooled_std: float | None) -> _Drawn | None:
    """Return what to draw of a tensor; None if it is unchanged, or has no spread to measure a change by."""
    a, b, pair = tensor.a, tensor.b, tensor.pair
    if not (a and b and pair and pair.stats and pair.changed and not pair.broken and {a.dtype, b.dtype} <= set(FLOATS)):
        return None
    std = pooled_std or pair.stats.moments.std
    return _Drawn(tensor.name, tensor.component, a, b, std, pair.rms / std) if 0 < std < math.inf else None


def _differences(comparison: Comparison, drawn: Sequence[_Drawn]) -> Iterator[np.ndarray]:
    """Sample d / std of every tensor that changed."""
    with open_all(comparison.a) as a_sources, open_all(comparison.b) as b_sources:
        a, b = TensorIndex(comparison.a, a_sources), TensorIndex(comparison.b, b_sources)
        for tensor in drawn:
            before = sample(*a.stored[tensor.component, tensor.a.name])
            after = sample(*b.stored[tensor.component, tensor.b.name])
            yield _finite(after - before) / tensor.std


def _standardized(inspection: Inspection, drawn: Mapping[TensorInfo, Moments]) -> Iterator[np.ndarray]:
    """Sample (w - mean) / std of every tensor."""
    with open_all(inspection.checkpoint) as sources:
        for info, moments in drawn.items():
            yield (_finite(sample(sources[info.file], info.tensor)) - moments.mean) / moments.std


def _finite(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = values[np.isfinite(values)]
    return found


def _around(drawn: Sequence[_Drawn]) -> np.ndarray:
    """Return bins for what is not expected to be of any size: four times its own."""
    squares = [tensor.value**2 for tensor in drawn if math.isfinite(tensor.value)]
    reach = 4 * math.sqrt(sum(squares) / len(squares)) if any(squares) else 1.0
    return np.linspace(-reach, reach, _BINS + 1)


def _changes(recipe: Recipe, plan: Plan) -> Iterator[np.ndarray]:
    """Sample (w' - w) / std of every perturbed tensor."""
    for file in recipe.files:
        path = plan.out / file.name
        with (
            closing(open_weights(plan.checkpoint, file.source)) as before,
            closing(TensorFile(path, label=str(path))) as after,
        ):
            old = {tensor.name: tensor for tensor in before.header.tensors}
            new = {tensor.name: tensor for tensor in after.header.tensors}
            for tensor in file.tensors:
                if std := tensor.effect and (recipe.pooled_std or tensor.std):
                    yield (sample(after, new[tensor.name]) - sample(before, old[tensor.name])) / std


def _expected_noise(settings: NoisyTune) -> tuple[np.ndarray, Density, str]:
    """Return bins for the noise, the density it is drawn from, and that one's name."""
    lam = settings.lam
    name = f"{settings.noise}, lam {lam:g}"
    if settings.noise == "uniform":
        # the density's jumps lie on edges
        return np.linspace(-0.75 * lam, 0.75 * lam, _BINS + 1), lambda x: (abs(x) <= lam / 2) / lam, name
    sigma = lam * UNIT_STD
    return np.linspace(-4 * sigma, 4 * sigma, _BINS + 1), lambda x: _normal(x / sigma) / sigma, name


def _normal(x: np.ndarray) -> np.ndarray:
    density: np.ndarray = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return density


def _histogram(
    what: str,
    samples: Iterable[np.ndarray],
    edges: np.ndarray,
    density: Density | None = None,
    density_name: str = "",
) -> Histogram:
    counts, total = np.zeros(len(edges) - 1, np.int64), 0
    for values in samples:
        counts += np.histogram(values, edges)[0]
        total += values.size
    return Histogram(what, edges, counts, total - int(counts.sum()), density, density_name)
