"""NoisyTune's settings, which tensors they perturb and which are copied, and the statistics that scale the noise.

    w' = w + U(-lam/2, lam/2) * std(w)      per parameter matrix

Wu, Wu, Qi, Huang: NoisyTune: A Little Noise Can Help You Finetune Pretrained Language Models Better, ACL 2022,
arXiv 2202.12024, eq. 1. The paper finds lam of 0.1 to 0.15 best, and 0.3 too much.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.display import Brief
from surgery.errors import SettingError, SourceError
from surgery.globs import matches
from surgery.noise import BLOCK, LANES, SAMPLED_BLOCKS
from surgery.roles import Role

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that can be perturbed, in safetensors' names."""

NO_SPREAD = "all elements equal, no spread"
"""Why a tensor is copied whose std turned out to be 0."""

NOT_INCLUDED, EXCLUDED = "not in --include", "in --exclude"
"""Why a tensor is copied that the settings leave out."""

NOISES = ("uniform", "normal")
SCALES = ("matrix", "global")
ROUNDINGS = ("nearest", "stochastic")

PARAMETER = Role(False, None)


@dataclass(frozen=True, repr=False)
class NoisyTune(Brief):
    """What to do to a checkpoint. Validated when made; raises SettingError.

    Args:
        lam: noise intensity, in [0, 1]; the noise's full width in units of std(w). Paper: 0.1 to 0.15.
        seed: in [0, 2^64).
        noise: "uniform" (the paper's) or "normal", with the same standard deviation, lam * std(w) / sqrt(12).
        scale: "matrix" (the paper's), std of each tensor; or "global", one std of all perturbed elements together.
        rounding: "nearest", or "stochastic", which keeps the mean of noise too small for float16 or bfloat16.
        include: globs of tensor names; if any, only these are perturbed. `*` stays within one dotted part of a name,
            `**` spans any number of them. One without `**` whose last part is spelled out overrules what is known of
            buffers: `h.*.attn.bias` perturbs them, `**` and `**.bias` do not.
        exclude: globs of tensor names that are not perturbed.
    """

    lam: float = 0.15
    seed: int = 0
    noise: str = "uniform"
    scale: str = "matrix"
    rounding: str = "nearest"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", float(self.lam))  # an int, or a number of numpy's, is as good
        object.__setattr__(self, "seed", int(self.seed))
        if not 0 <= self.lam <= 1:  # also false for NaN
            raise SettingError(f"lam: expected a number from 0 to 1, got {self.lam}. The paper uses 0.1 to 0.15.")
        if not 0 <= self.seed < 2**64:
            raise SettingError(f"seed: expected an integer from 0 to 2^64 - 1, got {self.seed}. Choose another.")
        for name, known in (("noise", NOISES), ("scale", SCALES), ("rounding", ROUNDINGS)):
            if (given := getattr(self, name)) not in known:
                raise SettingError(f"{name}: expected {' or '.join(known)}, got {given!r}. Choose one of them.")

    def reason_to_copy(self, name: str, dtype: str, shape: Sequence[int], role: Role = PARAMETER) -> str | None:
        """Say why this tensor is copied unchanged, as far as its header tells, or None if it is perturbed."""
        if dtype not in FLOATS:
            return f"{dtype}, not floating point"
        if role.is_buffer:
            return role.reason
        if math.prod(shape) == 0:
            return "empty"
        if math.prod(shape) == 1:
            return "one element, no spread"
        if self.include and not any(matches(glob, name) for glob in self.include):
            return NOT_INCLUDED
        if any(matches(glob, name) for glob in self.exclude):
            return EXCLUDED
        return "lam is 0" if self.lam == 0 else None

    def overrule(self, name: str, role: Role) -> Role:
        """Return the role of a tensor by these settings: an include glob that names a buffer makes it a parameter.

        A glob does with a last part without wildcards and no `**`: one for many tensors does not mean their buffers.
        """
        is_named = role.is_buffer and any(_is_exact(glob) and matches(glob, name) for glob in self.include)
        return Role(False, role.known) if is_named else role

    def check_globs(self, names: Iterable[str]) -> None:
        """Raise SettingError for an include or exclude glob that matches no tensor: it would do nothing in silence."""
        names = list(names)
        for option, globs in (("`include`", self.include), ("`exclude`", self.exclude)):
            for glob in globs:
                if not any(matches(glob, name) for name in names):
                    raise SettingError(
                        f"{option} {glob!r}: expected a glob that matches a tensor, got none of {len(names)}, such as "
                        f"{names[0]!r}. `*` stays within one dotted part of a name, `**` spans several."
                    )

    def noise_scale(self, std: float, dtype: str) -> float:
        """Return lam * std as the kernels take it: float64, rounded to float32 for all but F64 tensors."""
        scale = self.lam * std
        return scale if dtype == "F64" else float(np.float32(scale))


def _is_exact(glob: str) -> bool:
    return "**" not in glob and not set(glob.rpartition(".")[2]) & set("*?[")


def as_globs(option: str, patterns: str | Iterable[str] | None) -> tuple[str, ...]:
    """Take one glob, several or none; a string is one, not its characters.

    Raises:
        SettingError: it is none of these.
    """
    globs: tuple[object, ...] = (patterns,)
    if patterns is None:
        globs = ()
    elif isinstance(patterns, Iterable) and not isinstance(patterns, str | bytes):
        globs = tuple(patterns)
    if not all(isinstance(glob, str) for glob in globs):
        raise SettingError(f"{option}: expected a glob or several, got {patterns!r}. Give strings.")
    return tuple(str(glob) for glob in globs)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a tensor's elements, float64."""

    n: int
    mean: float
    m2: float

    @property
    def std(self) -> float:
        """Unbiased standard deviation, as torch.std; 0 for fewer than two elements."""
        return math.sqrt(self.m2 / (self.n - 1)) if self.n > 1 else 0.0


def merge_blocks(blocks: np.ndarray, n: int, shift: float, *, what: str) -> Moments:
    """Merge a tensor's block sums, shape (blocks, 2), in the contract's order-free way.

    Args:
        n: number of elements in the tensor.
        shift: its first element.
        what: tensor and file, for the error.
    Raises:
        SourceError: the tensor holds NaN or Inf, or values too large for a finite standard deviation.
    """
    if not np.isfinite(blocks).all():
        raise SourceError(
            f"{what}: expected finite values, got NaN, Inf or values whose spread overflows. Repair the checkpoint, or "
            "leave the tensor out with `exclude`."
        )
    s1, s2 = (math.fsum(column) for column in blocks.T.tolist())
    return Moments(n, shift + s1 / n, max(s2 - s1 * s1 / n, 0.0))


def pool(parts: Sequence[Moments]) -> Moments:
    """Merge the moments of tensors into those of all their elements together, whatever their order."""
    if not parts:
        return Moments(0, 0.0, 0.0)
    n = sum(part.n for part in parts)
    mean = math.fsum(part.n * part.mean for part in parts) / n
    m2 = math.fsum([part.m2 for part in parts] + [part.n * (part.mean - mean) ** 2 for part in parts])
    return Moments(n, mean, m2)


@dataclass(frozen=True)
class Effect:
    """What the noise did to one tensor, measured on one element in 64, and on all if there are up to 1024.

    Args:
        noise_over_std: rms of (w' - w), over std(w); lam / sqrt(12) when nothing is lost.
        survived: share of the noise that is still there after rounding to the tensor's dtype: the regression
            coefficient of w' - w on the noise drawn. 1 when nothing is lost, 0 when all of it is.
    """

    noise_over_std: float
    survived: float


def merge_effect(blocks: np.ndarray, n: int, std: float, *, what: str) -> Effect:
    """Merge a tensor's block sums, shape (blocks, 4), of change * noise, noise^2, change^2 and overflows.

    Raises:
        SourceError: a perturbed element is too large for the tensor's dtype.
    """
    if blocks[:, 3].any():
        raise SourceError(
            f"{what}: expected perturbed values that fit its dtype, got some that overflow. Lower `lam`, or "
            "leave the tensor out with `exclude`."
        )
    stride = BLOCK * SAMPLED_BLOCKS
    sampled = n // stride * LANES + min(n % stride, LANES)
    product, drawn, changed = (math.fsum(column) for column in blocks[::SAMPLED_BLOCKS, :3].T.tolist())
    return Effect(math.sqrt(changed / sampled) / std, product / drawn if drawn else 0.0)
