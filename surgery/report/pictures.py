"""What there is to see of a run of NoisyTune, of two checkpoints, or of one: as a picture to draw."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from surgery.errors import SettingError
from surgery.noise import UNIT_STD
from surgery.noisytune import NoisyTune
from surgery.plan import Plan, open_source
from surgery.recipe import Recipe
from surgery.report.plot import Density, Histogram, Picture, check_plot
from surgery.sample import sample
from surgery.tensorfile import TensorFile

_BINS = 60


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
    return Picture(title, values, f"rms d / {unit}", settings.lam * UNIT_STD, histogram)


def _changes(recipe: Recipe, plan: Plan) -> Iterator[np.ndarray]:
    """Sample (w' - w) / std of every perturbed tensor."""
    for file in recipe.files:
        path = plan.out / file.name
        with (
            closing(open_source(plan.checkpoint, file.source)) as before,
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
