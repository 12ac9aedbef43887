"""Choose what --plot draws of a perturbation, a diff or an inspection: a figure per tensor, and a histogram."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from surgery.checkpoint.resolve import Checkpoint
from surgery.checkpoint.tensorfile import Tensor
from surgery.errors import SettingError, some
from surgery.escapes import printable
from surgery.inspect.comparison import EQUAL, Comparison, TensorComparison
from surgery.inspect.diff import TensorIndex
from surgery.inspect.inspection import Inspection, TensorInfo, components, open_all
from surgery.inspect.sample import sample
from surgery.noise import UNIT_STD
from surgery.noisytune import FLOATS, Moments, NoisyTune
from surgery.report.drawing import check_plot
from surgery.report.grid import Cell, Mark
from surgery.report.plot import Density, Histogram, Picture
from surgery.report.widths import shorten

_BINS = 30  # of a 16-bit tensor more would show its grid rather than the noise
_LONGEST_NAME = 50
_LONGEST_VERDICT = 130

_UNCHANGED = Mark("=", "unchanged")
_SAME_VALUES = Mark("t", "another dtype, the same values")
_ONLY_IN_A = Mark("A", "only in A", is_alarm=True)
_ONLY_IN_B = Mark("B", "only in B", is_alarm=True)
_UNFIT = Mark("x", "another shape, NaN or Inf", is_alarm=True)
_NO_STD = Mark("!", "changed, but A has no std", is_alarm=True)
_FLAT = Mark("0", "all elements equal")
_NO_FLOATS = Mark("i", "not floats")
_BROKEN = Mark("x", "NaN or Inf", is_alarm=True)


def check_noise_plot(path: Path, settings: NoisyTune, *, dry_run: bool, recipe_only: bool) -> None:
    """Refuse a picture of noise that could not be drawn or written in the end.

    Raises:
        SettingError: there will be no noise in weights; or as check_plot.
        OutputError: as check_plot.
    """
    without = {"--dry-run": dry_run, "--recipe-only": recipe_only, "lam 0": settings.lam == 0}
    if found := next((name for name, is_so in without.items() if is_so), None):
        raise SettingError(f"--plot: expected noise to draw, got {found}. Leave one of them out.")
    check_plot(path)


def noise_picture(comparison: Comparison, settings: NoisyTune) -> Picture:
    """Picture what a finished run did: B is the perturbed copy of A. It is diff_picture, but for the title."""
    title = f"{_short(comparison.a)}: NoisyTune, lam {settings.lam:g}, seed {settings.seed}"
    return replace(diff_picture(comparison), title=title)


def diff_picture(comparison: Comparison) -> Picture:
    """Picture how B differs from A: each tensor's rms d over std(A), and its elements' d over std(A).

    Where B's recipe says that it was made from A, both stand beside the noise that the recipe asked for.
    """
    recipe = comparison.agreement.recipe if comparison.agreement else None
    pooled = recipe.pooled_std if recipe else None
    drawn = {tensor.name: found for tensor in comparison.tensors if (found := _drawn(tensor, pooled))}
    cells = {t.name: drawn[t.name].cell if t.name in drawn else _marked(t) for t in comparison.tensors}
    title = f"{_short(comparison.b)} against {_short(comparison.a)}"
    verdict = _verdict(comparison, [one.cell for one in drawn.values()])
    what, samples = f"d / {'pooled std' if pooled else 'std(A)'}", _differences(comparison, drawn.values())
    if recipe and recipe.settings.lam:
        histogram, expected = (
            _histogram(what, samples, *_expected_noise(recipe.settings)),
            recipe.settings.lam * UNIT_STD,
        )
    else:
        histogram, expected = _histogram(what, samples, _around(list(drawn.values()))), None
    return Picture(
        title, shorten(verdict, _LONGEST_VERDICT), dict(sorted(cells.items())), f"rms {what}", expected, histogram
    )


def stats_picture(inspection: Inspection) -> Picture:
    """Picture what a checkpoint holds: each tensor's std, and its elements beside the normal distribution."""
    part = components(inspection.checkpoint)
    drawn = {info: info.stats.moments for info in inspection.tensors if info.stats and _has_spread(info)}
    cells = {f"{part[info.file]}/{info.name}".lstrip("/"): _stats_cell(info) for info in inspection.tensors}
    edges = np.linspace(-5, 5, _BINS + 1)
    histogram = _histogram("(w - mean) / std", _standardized(inspection, drawn), edges, _normal, "normal")
    title = f"{_short(inspection.checkpoint)}: its weights"
    return Picture(title, shorten(_health(inspection), _LONGEST_VERDICT), cells, "std(w)", None, histogram)


def _short(checkpoint: Checkpoint) -> str:
    return shorten(printable(checkpoint.short_name), _LONGEST_NAME)


def _has_spread(info: TensorInfo) -> bool:
    return info.tensor.dtype in FLOATS and info.stats is not None and 0 < info.stats.moments.std < math.inf


def _stats_cell(info: TensorInfo) -> Cell:
    size, stats = info.tensor.size, info.stats
    if stats and (stats.nan or stats.inf):
        return Cell(size, mark=_BROKEN)
    if not stats or info.tensor.dtype not in FLOATS:
        return Cell(size, mark=_NO_FLOATS)
    return Cell(size, stats.moments.std) if _has_spread(info) else Cell(size, 0.0, _FLAT)


def _health(inspection: Inspection) -> str:
    """Say in one line whether all of a checkpoint's elements are numbers, and how many there are."""
    size = sum(info.tensor.size for info in inspection.tensors)
    broken = [info.name for info in inspection.tensors if info.stats and (info.stats.nan or info.stats.inf)]
    found = f"NaN or Inf in {len(broken)}: {some(broken)}" if broken else "no NaN, no Inf"
    return f"{len(inspection.tensors)} tensors, {size:,} elements; {found}"


def _verdict(comparison: Comparison, drawn: Sequence[Cell]) -> str:
    """Say in one line what the figures come to: whether they are the recipe's, or how many tensors changed."""
    n = sum(cell.size for cell in drawn)
    rms = math.sqrt(math.fsum(cell.size * (cell.value or 0.0) ** 2 for cell in drawn) / n) if n else 0.0
    total, equal = len(comparison.tensors), comparison.count(EQUAL)
    counts = f"{total - equal} of {total} tensors differ" if total > equal else f"all {total} tensors are equal"
    size = f", rms d / std {rms:.4g}" if n else ""
    agreement = comparison.agreement
    if agreement is None:
        return f"{counts}{size}"
    settings = agreement.recipe.settings
    asked = f"perturb(A, lam {settings.lam:g}, seed {settings.seed})"
    if wrong := list(agreement.disagreeing):
        return f"does NOT agree with {asked} in {len(wrong)} tensors: {some(wrong)}"
    lost = f"; rounding took all noise from {len(agreement.recipe.vanished)}" if agreement.recipe.vanished else ""
    return f"agrees with {asked}: {counts}{size} (expected {settings.lam * UNIT_STD:.4g}){lost}"


@dataclass(frozen=True)
class _Drawn:
    """A tensor that changed, with the std to measure that by, and its rms d over that."""

    component: str
    a: Tensor
    b: Tensor
    std: float
    cell: Cell


def _drawn(tensor: TensorComparison, pooled_std: float | None) -> _Drawn | None:
    """Return what to draw of a tensor; None if it is unchanged, or has no spread to measure a change by."""
    a, b, pair = tensor.a, tensor.b, tensor.pair
    if not (a and b and pair and pair.stats and pair.changed and not pair.broken and {a.dtype, b.dtype} <= set(FLOATS)):
        return None
    std = pooled_std or pair.stats.moments.std
    return _Drawn(tensor.component, a, b, std, Cell(a.size, pair.rms / std)) if 0 < std < math.inf else None


def _marked(tensor: TensorComparison) -> Cell:
    """Return the sign of a tensor that has no rms d over std."""
    a, b, pair = tensor.a, tensor.b, tensor.pair
    if not (a and b):
        return Cell(a.size, mark=_ONLY_IN_A) if a else Cell(b.size if b else 0, mark=_ONLY_IN_B)
    if tensor.kind == EQUAL:
        return Cell(a.size, 0.0, _UNCHANGED)
    if pair is None or pair.broken:
        return Cell(a.size, mark=_UNFIT)
    return Cell(a.size, mark=_NO_STD) if pair.changed else Cell(a.size, 0.0, _SAME_VALUES)


def _differences(comparison: Comparison, drawn: Iterable[_Drawn]) -> Iterator[np.ndarray]:
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


def _around(drawn: Iterable[_Drawn]) -> np.ndarray:
    """Return bins for what is not expected to be of any size: four times its own."""
    squares = [one.cell.value**2 for one in drawn if one.cell.value is not None and math.isfinite(one.cell.value)]
    reach = 4 * math.sqrt(sum(squares) / len(squares)) if any(squares) else 1.0
    return np.linspace(-reach, reach, _BINS + 1)


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
