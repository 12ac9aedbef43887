"""The options of `surgery run`: flags on its command line, SURGERY_* variables in every process below it."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from surgery.errors import SettingError

from ..settings import Anchor, Mixout, RDrop
from .folder import RUN_DIR

PREFIX = "SURGERY_"


@dataclass(frozen=True)
class Options:
    """The regularizers of a run. Validated when made; raises SettingError.

    Args:
        noisytune: lam of the noise, in [0, 1].
        mixout: p, in [0, 1].
        rdrop: alpha, at least 0.
        anchor: weight, at least 0.
        rdrop_every: R-Drop fires at each such optimizer step.
        mixout_granularity: "neuron" or "element".
        seed: of the noise, in [0, 2^64). Masks follow torch.manual_seed.
        include: globs of model classes or parameters; if any, only these are regularized.
        exclude: globs of model classes or parameters that are not.
        w_pre: "perturbed", what the noise has made of the weights, or "original", what they were before.
        report: the JSON file to write, an absolute path; None for none.
        allow_inactive: a regularizer that had no effect is no failure.
    """

    noisytune: float | None = None
    mixout: float | None = None
    rdrop: float | None = None
    anchor: float | None = None
    rdrop_every: int | None = None
    mixout_granularity: Literal["neuron", "element"] | None = None
    seed: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    w_pre: Literal["perturbed", "original"] | None = None
    report: str | None = None
    allow_inactive: bool = False

    def __post_init__(self) -> None:
        if not self.asked:
            raise SettingError(
                "regularizer: expected noisytune, mixout, rdrop or anchor, got none. Give one, such as --mixout 0.7."
            )
        if self.noisytune is not None and not 0 < self.noisytune <= 1:
            raise SettingError(
                f"noisytune: expected a lam above 0, up to 1, got {self.noisytune:g}. The paper uses 0.1 to 0.15."
            )
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise SettingError(f"seed: expected an integer from 0 to 2^64 - 1, got {self.seed}. Choose another.")
        if self.w_pre not in (None, "perturbed", "original"):
            raise SettingError(f"w_pre: expected perturbed or original, got {self.w_pre!r}. Choose one of them.")
        self._refuse_idle()
        _ = self.mixout_setting, self.rdrop_setting, self.anchor_setting  # they check their numbers

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the regularizers that are asked for."""
        return tuple(name for name in ("noisytune", "mixout", "rdrop", "anchor") if getattr(self, name) is not None)

    @property
    def mixout_setting(self) -> Mixout | None:
        return None if self.mixout is None else Mixout(self.mixout, self.mixout_granularity or "neuron")

    @property
    def rdrop_setting(self) -> RDrop | None:
        return None if self.rdrop is None else RDrop(self.rdrop, 1 if self.rdrop_every is None else self.rdrop_every)

    @property
    def anchor_setting(self) -> Anchor | None:
        return None if self.anchor is None else Anchor(self.anchor)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that say the same."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {PREFIX + name.upper(): _write(value) for name, value in named.items() if not _is_empty(value)}

    def _refuse_idle(self) -> None:
        """Refuse an option that would do nothing without a regularizer that is not asked for."""
        weights = "anchor" if self.anchor is not None else "mixout"
        for option, needed in (
            ("rdrop_every", ("rdrop",)),
            ("mixout_granularity", ("mixout",)),
            ("seed", ("noisytune",)),
            ("w_pre", ("noisytune", weights)),
        ):
            missing = [name for name in needed if name not in self.asked]
            if getattr(self, option) is not None and missing:
                raise SettingError(
                    f"{option}: expected {' and '.join(needed)} with it, got none. Add it, or leave {option} out."
                )


def read_options(variables: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> Options | None:
    """Read the options of environment variables; None if they ask for nothing.

    Args:
        variables: the environment; an empty variable is none.
        flags: values that win over the variables, by their names in Options; None, () and False are none.
    Raises:
        SettingError: a value is of the wrong kind or out of range, or a SURGERY_ variable is unknown.
    """
    given = {name: value for name, value in variables.items() if name.startswith(PREFIX) and name != RUN_DIR}
    known = {PREFIX + field.name.upper(): field.name for field in fields(Options)}
    for name in given.keys() - known.keys():
        raise SettingError(f"{name}: expected one of {', '.join(known)}, got an unknown variable. Correct its name.")
    values: dict[str, Any] = {known[name]: _READ[known[name]](name, value) for name, value in given.items() if value}
    values |= {name: value for name, value in (flags or {}).items() if not _is_empty(value)}
    return Options(**values) if values else None


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == ()  # 0 is a value


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return shlex.join(value)
    return "1" if value is True else str(value)


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise SettingError(f"{name}: expected a number, got {value!r}. Correct it.")
    return number


def _whole(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise SettingError(f"{name}: expected a whole number, got {value!r}. Correct it.") from error


def _flag(name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise SettingError(f"{name}: expected 1 or 0, got {value!r}. Choose one of them.")
    return value == "1"


def _globs(name: str, value: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise SettingError(f"{name}: expected globs with spaces between, got {value!r}. Mend the quotes.") from error


def _text(name: str, value: str) -> str:  # noqa: ARG001
    return value


_READ: dict[str, Any] = {
    "noisytune": _number,
    "mixout": _number,
    "rdrop": _number,
    "anchor": _number,
    "rdrop_every": _whole,
    "mixout_granularity": _text,
    "seed": _whole,
    "include": _globs,
    "exclude": _globs,
    "w_pre": _text,
    "report": _text,
    "allow_inactive": _flag,
}
