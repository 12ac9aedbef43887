"""Check the differences between two checkpoints against B's recipe: is B = perturb(A), as far as the figures tell?"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from surgery.checkpoint.weight_file import digests_of_sources
from surgery.inspect.comparison import Agreement, TensorComparison
from surgery.inspect.inspection import components, read_recipe
from surgery.noise import BLOCK, LANES, SAMPLED_BLOCKS, UNIT_STD
from surgery.noisytune import NoisyTune
from surgery.recipe import Recipe, TensorRecord

if TYPE_CHECKING:
    from surgery.checkpoint.resolve import Checkpoint
    from surgery.inspect.tensor_diff import TensorDiff

_SIGMAS = 6.0
_SPREAD = {"uniform": 0.2**0.5, "normal": 0.5**0.5}
"""Standard error of the rms of n draws, times sqrt(n), over the rms."""
_PRECISION = {"F64": (2.0**-53, 0.0), "F32": (2.0**-24, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 0.0)}
"""Largest error of rounding to nearest: relative, and absolute where numbers are subnormal."""
_SAME = 1e-6
"""How far two figures may be apart that were measured on the same elements: perturb subtracts in float32."""


def check_agreement(a: "Checkpoint", b: "Checkpoint", tensors: "Iterable[TensorComparison]") -> Agreement | None:
    """Compare the differences between A and B with B's recipe; None if B has none, or one of another source.

    For each perturbed tensor, std(A) must be the recipe's, to the bit, and rms d / std the one it recorded and
    lam / sqrt(12), up to chance and rounding; each copied tensor must be equal.
    """
    recipe = read_recipe(b)
    if recipe is None or not is_source(a, recipe):
        return None
    found = {(tensor.component, tensor.b.name): tensor for tensor in tensors if tensor.b}
    component_of = components(b)
    disagreeing = {}
    for file in recipe.files:
        component = component_of.get(file.name) or file.name.rpartition("/")[0]
        for record in file.tensors:
            tensor = found.get((component, record.name))
            if fault := _fault(recipe, record, tensor.pair if tensor else None):
                disagreeing[f"{component}/{record.name}" if component else record.name] = fault
    return Agreement(recipe, disagreeing)


def is_source(a: "Checkpoint", recipe: Recipe) -> bool:
    """Tell whether a checkpoint is the one that a recipe was made from."""
    if recipe.commit and (recipe.source, recipe.commit) == (a.id, a.commit):
        return True
    known = recipe.source_digests
    is_there = all(a.holds(part) for name in known for part in a.parts(name))
    return is_there and digests_of_sources(a, known) == known


def _fault(recipe: Recipe, record: TensorRecord, pair: "TensorDiff | None") -> str | None:
    """Say what is not as the recipe has it, in a few words."""
    if pair is None:
        return "missing, or of another shape"
    if record.copied:
        return f"changed, though copied ({record.copied})" if pair.changed else None
    std = pair.stats.moments.std if pair.stats else None
    if std != record.std:
        return f"std(A) is {std}, not {record.std}"
    if pair.broken:
        return f"{pair.broken} NaN or Inf"
    assert record.effect
    assert record.std
    scale = recipe.pooled_std or record.std
    figure, expected = pair.rms / scale, recipe.settings.lam * UNIT_STD
    n, sampled = pair.measured, _sampled(pair.measured)
    near, nearer = (_tolerance(recipe.settings, expected, _rounding(recipe, record, pair), k) for k in (sampled, n))
    recorded = record.effect.noise_over_std
    if not abs(figure - recorded) <= (near if sampled < n else _SAME):
        return f"rms d / std is {figure:.6f}, {recorded:.6f} recorded"
    if not abs(figure - expected) <= nearer:
        return f"rms d / std is {figure:.6f}, {expected:.6f} expected"
    return None


def _sampled(n: int) -> int:
    """Return how many elements of a tensor the recipe's figure is measured on."""
    stride = BLOCK * SAMPLED_BLOCKS
    return n // stride * LANES + min(n % stride, LANES)


def _rounding(recipe: Recipe, record: TensorRecord, pair: "TensorDiff") -> float:
    """Bound the rms of what rounding to the tensor's dtype did, over the std that scaled the noise."""
    relative, smallest = _PRECISION[record.dtype]
    error = relative * math.sqrt(pair.sum_b2 / pair.measured) + smallest
    return error * (2 if recipe.settings.rounding == "stochastic" else 1) / (recipe.pooled_std or record.std or 1.0)


def _tolerance(settings: NoisyTune, expected: float, rounding: float, n: int) -> float:
    """Return how far rms d / std may be from `expected` if measured on n elements.

    That is 6 standard errors of the rms of n draws, and what rounding adds: independent of the noise, it adds its
    square to that of the noise; where it takes the noise away, no more than itself.
    """
    by_chance: float = _SIGMAS * _SPREAD[settings.noise] * expected / math.sqrt(n)
    return by_chance + min(rounding, rounding * rounding / (2 * expected)) + _SAME
